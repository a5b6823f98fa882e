"""DPO on the last four blocks and the final norm, the adapter below them frozen, three epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark_cases import dpo, preferences
from benchmark_cases.frame import Work

BATCH = preferences.BATCH
EPOCHS = 3
OPENED = 4
LEARNING_RATE = 5.0e-6


def prepare(folder: Path, data: Path | None, rows: int) -> Work:
    """The rows, and an adapter to start from."""
    from pipeline.experiment import Lora, Unfreeze
    from pipeline.model.scope import lora_config

    pairs, says = preferences.write_rows(folder, data, rows)
    dpo.start_adapter(folder, Lora(), lora_config, Unfreeze())
    blocks, block, head = preferences.weights_of_blocks(folder)
    _, joint, completion = preferences.count_tokens(pairs)
    # A product costs 2 operations a weight, its gradients twice as many; the head passes a gradient on and has none.
    trunk = 2 * joint * (blocks - OPENED) * block
    reference = 2 * (joint * OPENED * block + completion * head)
    policy = EPOCHS * (6 * joint * OPENED * block + 4 * completion * head)
    return preferences.work_of(pairs, says, EPOCHS, trunk + reference + policy)


def train(folder: Path, side: str, precision: str, batch: int) -> dict[str, Any]:
    """One side. TRL trains the opened weights of a plain model; ours are copies beside a frozen adapter of zeros."""
    from pipeline.experiment import Dpo, Unfreeze
    from pipeline.model.policy import open_policy

    unfreeze = Unfreeze(last_blocks=OPENED, final_norm=True, learning_rate=LEARNING_RATE)
    stage = Dpo(
        num_train_epochs=float(EPOCHS),
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=batch,
        max_length=preferences.MAX_LENGTH,
        save_strategy="no",
        eval_strategy="no",
    )

    def stock() -> Any:
        model = preferences.load_model(folder).requires_grad_(False)
        for part in (*model.model.layers[-OPENED:], model.model.norm):
            part.requires_grad_(True)
        return model

    def own() -> Any:
        return open_policy(preferences.load_model(folder), folder / "start", unfreeze, adapter="frozen")

    return preferences.train_side(folder, side, precision, stage, unfreeze.learning_rate, stock, own)
