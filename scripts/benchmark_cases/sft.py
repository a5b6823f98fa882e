"""SFT of a LoRA adapter on all linear layers, one epoch, on rows of mixed length."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmark_cases import preferences
from benchmark_cases.frame import BASE, Work, placement

BATCH = 8
SHIPPED = preferences.SHIPPED.with_name("demonstrations.train.jsonl")


def prepare(folder: Path, data: Path | None, rows: int) -> Work:
    """Tokenises the first `rows` demonstrations."""
    from transformers import AutoTokenizer

    from pipeline.data.check import load_rows
    from pipeline.data.tokenised import label_demonstrations

    tokenizer = AutoTokenizer.from_pretrained(folder / BASE)
    chosen = load_rows(data or SHIPPED, "demonstration").rows[:rows]
    labelled, counted = label_demonstrations(tokenizer, chosen, preferences.MAX_LENGTH)
    (folder / "rows.json").write_text(json.dumps(labelled))
    blocks, block, head = preferences.weights_of_blocks(folder)
    # A product costs 2 operations a weight; the backward pass through frozen weights as much again.
    flops = 4 * (counted.tokens * blocks * block + counted.loss_tokens * head)
    lengths = sorted(len(row["input_ids"]) for row in labelled)
    says = (
        f"{len(labelled)} demonstrations of {(data or SHIPPED).name}: {counted.tokens:,} tokens, "
        f"{counted.loss_tokens:,} of them in the loss; rows of {lengths[0]} to {lengths[-1]}, "
        f"median {lengths[len(lengths) // 2]}"
    )
    return Work(len(labelled), counted.tokens, flops, says)


def train(folder: Path, side: str, precision: str, batch: int) -> dict[str, Any]:
    """One side; what this project finds out about the model before the first step counts as training."""
    import warnings
    from contextlib import ExitStack

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    from pipeline.experiment import Lora, Sft, Unfreeze
    from pipeline.model.device import reuse_memory
    from pipeline.model.ground import quiet_libraries
    from pipeline.model.scope import lora_config
    from pipeline.training.arguments import sft_config
    from pipeline.training.engine.demonstrations import DemonstrationTrainer
    from pipeline.training.engine.head import compact_head
    from pipeline.training.engine.linear import join_products
    from pipeline.training.engine.norms import join_norms
    from pipeline.training.engine.padding_free import leave_padding_out
    from pipeline.training.engine.precision import multiplication

    quiet_libraries()
    warnings.simplefilter("ignore")
    steps: list[dict[str, float]] = []

    class Record(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                steps.append({"loss": logs["loss"]})

    stage = Sft(
        per_device_train_batch_size=batch,
        max_length=preferences.MAX_LENGTH,
        save_strategy="no",
        eval_strategy="no",
    )
    at = placement()
    config = sft_config(stage, output=folder / side, seed=preferences.SEED, placement=at, evaluates=False)
    config.gradient_checkpointing = config.activation_checkpointing = side == "trl"
    ours = side == "ours"
    if ours:
        reuse_memory()
    model = preferences.load_model(folder)
    with ExitStack() as stack:
        if ours:
            products = stack.enter_context(multiplication(precision, at.device))  # type: ignore[arg-type]
            stack.enter_context(compact_head(at.device, rounds=products.round_gradients))
        trainer = (DemonstrationTrainer if ours else SFTTrainer)(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(json.loads((folder / "rows.json").read_text())),
            processing_class=AutoTokenizer.from_pretrained(folder / BASE),
            peft_config=lora_config(model, Lora(), Unfreeze()),
        )
        trainer.add_callback(Record())
        began = time.perf_counter()
        if ours:
            trainer.opened_learning_rate = stage.learning_rate
            join_products(trainer.model, rounds=products.round_gradients)
            join_norms(trainer.model)
            reason = leave_padding_out(trainer)
            assert reason is None, reason
        middle = time.perf_counter()
        trainer.train()
        seconds = {"preparation": middle - began, "training": time.perf_counter() - middle}
        return {"seconds": seconds, "steps": steps}
