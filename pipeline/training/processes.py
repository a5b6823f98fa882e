"""Several processes, one run: `torchrun` starts them, each trains on its part of a step, the first alone writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from pipeline.errors import PipelineError
from pipeline.runs.run import Run
from pipeline.training.callbacks import Guard


def processes() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join_processes(device: torch.device, say: Callable[[str], None]) -> None:
    """Makes the processes of a launcher one group.

    Raises:
        PipelineError: a launcher was asked for several processes and started one.
    """
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise PipelineError(
            "`accelerate launch` was asked for several processes, and started this one alone",
            code="not-distributed",
            mend="use `torchrun --nproc_per_node=N -m pipeline …`",
        )
    if processes() == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say(f"processes: {processes()}")


def require_processes(trainer: Any) -> None:
    """Every process that was started trains with the others.

    Raises:
        PipelineError: the trainer counts others than the launcher.
    """
    if trainer.args.world_size != processes():
        raise PipelineError(
            f"the launcher started {processes()} processes, but the trainer runs as one of {trainer.args.world_size}",
            code="not-distributed",
            mend="use `torchrun --nproc_per_node=N -m pipeline …`",
        )


def wait_for_first() -> None:
    """Returns when every process has come here: what the first one wrote before is on the disk."""
    if processes() > 1:
        dist.barrier()


class Follower(Run):
    """The run as the other processes know it: they follow what the first one writes, and write nothing."""

    def update(self, **fields: Any) -> None:
        """Sets fields in memory alone."""
        self.manifest.update(fields)


def agree_on_run(create: Callable[[], Run]) -> Run:
    """The run that the first process creates, in every process.

    Args:
        create: makes the run folder; called in the first process only.
    """
    if processes() == 1:
        return create()
    run = create() if is_first() else None
    told = [None if run is None else (str(run.path), run.manifest)]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None, "the first process tells where the run is"
    path, manifest = told[0]
    return run or Follower(Path(path), manifest)


def gathered(mine: Any) -> list[Any]:
    """A value of each process, in their order; all of them have to ask."""
    if processes() == 1:
        return [mine]
    everyones: list[Any] = [None] * processes()
    dist.all_gather_object(everyones, mine)
    return everyones


def agreed(mine: bool, device: torch.device) -> bool:
    """Whether it is so in any process; all of them have to ask."""
    if processes() == 1:
        return mine
    found = torch.tensor(int(mine), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


class Agreement(TrainerCallback):  # type: ignore[misc]
    """What stops one process, a signal or a loss that is not finite, stops all at that step. Before the guard."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the others."""
        self._guard.interrupted = agreed(self._guard.interrupted, args.device)
        if agreed(self._guard.not_finite is not None, args.device):
            self._guard.note_not_finite("a figure of another process", [])

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the others: none may leave an evaluation alone."""
        self._guard.interrupted = agreed(self._guard.interrupted, args.device)
