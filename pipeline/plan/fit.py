"""Whether a stage needs gradient checkpointing: its memory, as the plan counts it, against what the device has free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.experiment import Dpo, Experiment, Sft
from pipeline.model.base import BaseFiles
from pipeline.model.device import Placement, available_memory
from pipeline.plan.memory import Memory, memory_of
from pipeline.plan.outline import outline
from pipeline.plan.rhythm import Length, Rows, largest_batch
from pipeline.plan.trace import Batch
from pipeline.training.arguments import dpo_config, sft_config

_S = TypeVar("_S", bound=Sft | Dpo)
_SHARE = 0.85
"""Of the free memory: allocators leave gaps, and the process itself takes some."""


def settle_checkpointing(
    settings: _S,
    experiment: Experiment,
    files: BaseFiles,
    placement: Placement,
    lengths: Sequence[Length],
    say: Callable[[str], None],
) -> _S:
    """The stage with `gradient_checkpointing: auto` decided; any other setting stays.

    Where the memory of either kind cannot be told, checkpointing is off.

    Args:
        settings: the stage's section.
        experiment: the definition that it belongs to.
        files: the base.
        placement: where it will be trained; nothing has been loaded there yet.
        lengths: of each training row.
        say: tells the user, where it is on.
    """
    if settings.gradient_checkpointing != "auto":
        return settings
    free = available_memory(placement.device)
    needed = _needed(settings, experiment, files, placement, lengths).total
    on = free is not None and needed is not None and needed > _SHARE * free
    if on:
        assert free is not None
        assert needed is not None
        say(
            f"gradient checkpointing is on: without it the largest batch takes {needed / 2**30:.2f} GiB, "
            f"of {free / 2**30:.2f} GiB that are free"
        )
    return cast(_S, settings.model_copy(update={"gradient_checkpointing": on}))


def _needed(
    settings: Sft | Dpo,
    experiment: Experiment,
    files: BaseFiles,
    placement: Placement,
    lengths: Sequence[Length],
) -> Memory:
    """The memory of the stage without checkpointing."""
    dpo = isinstance(settings, Dpo)
    plain = settings.model_copy(update={"gradient_checkpointing": False})
    given: dict[str, Any] = {"output": Path(), "seed": experiment.seed, "placement": placement, "evaluates": False}
    args = dpo_config(plain, **given) if isinstance(plain, Dpo) else sft_config(plain, **given)
    batch: Batch = largest_batch(Rows((), lengths=tuple(lengths), rows=len(lengths)), args, dpo=dpo)
    made = outline(files, experiment, "dpo" if dpo else "sft", placement.dtype)
    return memory_of(made, batch, args, placement, dpo=dpo)
