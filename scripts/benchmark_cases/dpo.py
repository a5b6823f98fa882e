"""DPO on a LoRA adapter on all linear layers, one epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark_cases import preferences
from benchmark_cases.frame import Work

BATCH = preferences.BATCH
EPOCHS = 1


def prepare(folder: Path, data: Path | None, rows: int) -> Work:
    """The rows, and an adapter to start from."""
    from pipeline.experiment import Lora, Unfreeze
    from pipeline.model.scope import lora_config

    pairs, says = preferences.write_rows(folder, data, rows)
    start_adapter(folder, Lora(), lora_config, Unfreeze())
    blocks, block, head = preferences.weights_of_blocks(folder)
    _, joint, completion = preferences.count_tokens(pairs)
    # A product costs 2 operations a weight; the backward pass through frozen weights as much again.
    policy = EPOCHS * 4 * (joint * blocks * block + completion * head)
    reference = 2 * (joint * blocks * block + completion * head)
    return preferences.work_of(pairs, says, EPOCHS, policy + reference)


def start_adapter(folder: Path, lora: Any, configure: Any, unfreeze: Any) -> None:
    """An untrained adapter in `folder/start`: policy and reference are the base at first."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(preferences.SEED)
    model = preferences.load_model(folder)
    get_peft_model(model, configure(model, lora, unfreeze)).save_pretrained(folder / "start")


def train(folder: Path, side: str, precision: str, batch: int) -> dict[str, Any]:
    """One side."""
    from peft import PeftModel

    from pipeline.experiment import Dpo

    stage = Dpo(
        num_train_epochs=float(EPOCHS),
        per_device_train_batch_size=batch,
        max_length=preferences.MAX_LENGTH,
        save_strategy="no",
        eval_strategy="no",
    )

    def stock() -> Any:
        return PeftModel.from_pretrained(preferences.load_model(folder), folder / "start", is_trainable=True)

    return preferences.train_side(folder, side, precision, stage, stage.learning_rate, stock, stock)
