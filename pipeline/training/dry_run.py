"""A dry run: a few steps on the rows that need the most memory, and nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

from pipeline.experiment import Dpo, Sft
from pipeline.model.device import Placement, peak_memory

_S = TypeVar("_S", Sft, Dpo)
DRY_RUN_STEPS = 3


def dry_run_of(stage: _S) -> _S:
    """The stage cut to a few steps, with no evaluation and no checkpoint."""
    return stage.model_copy(update={"max_steps": DRY_RUN_STEPS, "eval_strategy": "no", "save_strategy": "no"})


def longest(dataset: Any, stage: Sft | Dpo, length: Callable[[dict[str, Any]], int]) -> Any:
    """The rows that need the most memory, as many as the steps of a dry run take, the longest first."""
    count = DRY_RUN_STEPS * stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    lengths = [length(row) for row in dataset]
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    return dataset.select(order[:count])


def say_dry_run(console: Console, metrics: dict[str, Any], placement: Placement) -> dict[str, Any]:
    """What a dry run found out; also for its JSON."""
    peak = peak_memory(placement)
    console.print(
        f"dry run: {DRY_RUN_STEPS} steps on the longest rows, loss {metrics['loss']:.4f}, "
        f"peak memory {peak / 2**30:.2f} GiB; nothing is kept",
        highlight=False,
    )
    return {"dry_run": True, "peak_memory_bytes": peak}
