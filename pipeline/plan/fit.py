"""A stage's memory, as the plan counts it, against what the device has free: whether it checkpoints, what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.errors import PipelineError
from pipeline.experiment import Dpo, Experiment, Sft
from pipeline.machine import is_out_of_memory, machine_failure
from pipeline.model.base import BaseFiles
from pipeline.model.device import Placement, available_memory
from pipeline.plan.memory import Memory, memory_of
from pipeline.plan.outline import outline
from pipeline.plan.rhythm import Length, Rows, largest_batch
from pipeline.plan.trace import Batch
from pipeline.training.arguments import dpo_config, sft_config

_S = TypeVar("_S", bound=Sft | Dpo)
_SHARE = 0.75
"""Of the free memory: allocators keep what was freed, and libraries take some. On a CPU a step of the built-in model
took 1.2 (DPO) to 1.3 times (SFT) what is counted."""


@dataclass
class Budget:
    """What a stage's memory comes to, for the message when it does not suffice. Filled in when it is known."""

    doing: str = "loading the model"
    settings: Sft | Dpo | None = None
    experiment: Experiment | None = None
    files: BaseFiles | None = None
    placement: Placement | None = None
    lengths: Sequence[Length] = ()
    free: int | None = None
    """Bytes, before anything was loaded."""

    def figures(self, error: BaseException) -> str:
        """The budget's words, where the error is one of memory: they take a moment to work out."""
        return self.words() if is_out_of_memory(error) else ""

    def words(self) -> str:
        """What the plan counts and what was free, as a part of a sentence; empty where nothing is known."""
        if self.settings is None or self.experiment is None or self.files is None or self.placement is None:
            return ""
        checkpointing = bool(self.settings.gradient_checkpointing is True)
        try:
            memory = needed(
                self.settings, self.experiment, self.files, self.placement, self.lengths, checkpointing=checkpointing
            )
        except (MemoryError, RuntimeError, PipelineError):  # there may be no memory even for this
            return f" for {self.doing}"
        total = memory.total
        counted = "what a step takes is not known" if total is None else f"the plan counts {gib(total)} for this stage"
        parts = ", ".join(
            f"{name.replace('_', ' ')} {gib(size)}" for name, size in memory.parts().items() if size is not None
        )
        was_free = "" if self.free is None else f"; {gib(self.free)} were free before it"
        return f" for {self.doing}: {counted} ({parts}){was_free}"


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB"


@contextmanager
def within_memory() -> Iterator[Budget]:
    """A stage's budget, which the stage fills in; memory that does not suffice inside is said with its figures.

    Raises:
        PipelineError: in place of what the machine raised.
    """
    budget = Budget()
    try:
        yield budget
    except PipelineError as error:
        if error.code == "out-of-memory" and error.pointer is not None:  # the base did not load
            error.message += budget.words()
            error.args = (error.message,)
        raise
    except Exception as error:
        failure = machine_failure(error, budget.figures(error))
        if failure is None:
            raise
        raise failure from error


def settle_checkpointing(
    settings: _S,
    experiment: Experiment,
    files: BaseFiles,
    placement: Placement,
    lengths: Sequence[Length],
    say: Callable[[str], None],
    budget: Budget | None = None,
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
        budget: is told all of it.
    """
    free = available_memory(placement.device)
    if settings.gradient_checkpointing == "auto":
        wanted = needed(settings, experiment, files, placement, lengths, checkpointing=False).total
        on = free is not None and wanted is not None and wanted > _SHARE * free
        if on:
            assert free is not None
            assert wanted is not None
            say(
                f"gradient checkpointing is on: without it the largest batch takes {gib(wanted)}, "
                f"of {gib(free)} that are free"
            )
        settings = cast(_S, settings.model_copy(update={"gradient_checkpointing": on}))
    if budget is not None:
        budget.settings, budget.experiment, budget.files, budget.placement = settings, experiment, files, placement
        budget.lengths, budget.free = lengths, free
    return settings


def needed(
    settings: Sft | Dpo,
    experiment: Experiment,
    files: BaseFiles,
    placement: Placement,
    lengths: Sequence[Length],
    *,
    checkpointing: bool,
) -> Memory:
    """The memory of the stage, with or without checkpointing."""
    dpo = isinstance(settings, Dpo)
    plain = settings.model_copy(update={"gradient_checkpointing": checkpointing})
    given: dict[str, Any] = {"output": Path(), "seed": experiment.seed, "placement": placement, "evaluates": False}
    args = dpo_config(plain, **given) if isinstance(plain, Dpo) else sft_config(plain, **given)
    batch: Batch = largest_batch(Rows((), lengths=tuple(lengths), rows=len(lengths)), args, dpo=dpo)
    made = outline(files, experiment, "dpo" if dpo else "sft", placement.dtype)
    return memory_of(made, batch, args, placement, dpo=dpo)
