"""`pipeline plan`: what a stage would train, and what that takes, from the configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.experiment import Dpo, Experiment, Sft, Unfreeze
from pipeline.model.base import BaseFiles
from pipeline.model.device import Placement, peak_memory, place
from pipeline.model.ground import quiet_libraries
from pipeline.model.scope import Trainable, trainable_of
from pipeline.plan.fit import settle_checkpointing
from pipeline.plan.memory import Memory, memory_of
from pipeline.plan.outline import find_config, outline
from pipeline.plan.rhythm import Rows, Steps, checkpoints_kept, count_rows, largest_batch, steps_of, unknown_length
from pipeline.plan.speed import Speed, measured_speed
from pipeline.plan.trace import Batch
from pipeline.runs.run import Stage
from pipeline.training.arguments import dpo_config, require_options, sft_config


@dataclass(frozen=True)
class StagePlan:
    """One stage: what trains, on what, for how long, and what it takes."""

    stage: Stage
    trainable: Trainable
    adapter_rate: float
    unfreeze: Unfreeze
    rows: Rows
    steps: Steps
    batch: Batch
    """The largest one."""
    memory: Memory
    checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    checkpoints: int | None
    speed: Speed | None

    @property
    def computed(self) -> Batch:
        """The largest batch as it is computed."""
        return self.batch if self.memory.without_padding else self.batch.padded()

    @property
    def tokens(self) -> int | None:
        """Tokens that are trained on in all."""
        counted, epochs = self.rows.counted, self.steps.epochs
        return None if counted is None or epochs is None else round(counted.tokens * epochs)

    @property
    def seconds(self) -> float | None:
        """How long it would train at the speed of an earlier run."""
        return None if self.speed is None or self.tokens is None else self.tokens / self.speed.tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        """The stage's part of the JSON."""
        rates = {"adapter": self.adapter_rate, "opened": self.unfreeze.learning_rate}
        memory, saved = self.memory, self.memory.adapter_and_opened
        return {
            "stage": self.stage,
            **self.trainable.as_dict(),
            "learning_rates": {group: rates[group] for group in self.trainable.groups},
            "unties_head": self.trainable.unties_head,
            "data": {
                "file": self.rows.file,
                "rows": self.rows.rows,
                "tokens": None if self.rows.counted is None else self.rows.counted.as_dict(),
                "account": list(self.rows.account),
            },
            "steps": self.steps.total,
            "steps_per_epoch": self.steps.per_epoch,
            "epochs": self.steps.epochs,
            "tokens": self.tokens,
            "largest_batch": {
                "sequences": self.batch.sequences,
                "length": self.batch.length,
                "positions": self.batch.positions,
                "tokens": self.computed.tokens,
            },
            "padding": not self.memory.without_padding,
            "memory_bytes": memory.total,
            "memory": memory.parts(),
            "memory_why_unknown": memory.why_unknown,
            "gradient_checkpointing": self.checkpointing,
            "disk": {
                "adapter": saved,
                "checkpoint": memory.checkpoint,
                "checkpoints_kept": self.checkpoints,
                "total": None if self.checkpoints is None else saved + self.checkpoints * memory.checkpoint,
            },
            "time": {
                "seconds": self.seconds,
                "tokens_per_second": None if self.speed is None else self.speed.tokens_per_second,
                "measured_in": None if self.speed is None else self.speed.run,
            },
        }


@dataclass(frozen=True)
class Plan:
    """The stages of an experiment, one of them asked for."""

    stage: Stage
    base: str
    device: str
    process_bytes: int | None
    """On a CPU: the memory of the process itself, measured on this one; libraries and rows are the same."""
    stages: dict[Stage, StagePlan]

    def as_dict(self) -> dict[str, Any]:
        """The stage that was asked for at the top, all of them under `stages`."""
        return {
            "base": self.base,
            "device": self.device,
            "process_bytes": self.process_bytes,
            **self.stages[self.stage].as_dict(),
            "stages": {name: stage.as_dict() for name, stage in self.stages.items()},
        }


def plan(experiment: Experiment, root: Path, console: Console, *, stage: Stage | None = None) -> Plan:
    """Plans the stages that the experiment has data for, and the one that is asked for in any case.

    Args:
        experiment: with absolute paths.
        root: where runs live; earlier ones tell the speed.
        console: where the user is told what goes on.
        stage: the one asked for; None: SFT, or DPO where there are preferences only.

    Raises:
        PipelineError: the base has no configuration, the scope does not fit it, or training would refuse the data.
    """
    data = experiment.data
    if stage is None:
        stage = "dpo" if data.preferences is not None and data.demonstrations is None else "sft"
    named = {"sft": data.demonstrations is not None, "dpo": data.preferences is not None}
    wanted: list[Stage] = [name for name in ("sft", "dpo") if named[name] or name == stage]
    for name in wanted:
        require_options(name, getattr(experiment, name).options)
    quiet_libraries()
    placement = place(experiment.model.device, experiment.model.dtype)
    files = find_config(experiment.model, tokenizer=any(named.values()), say=console.print)
    stages = {name: _plan_stage(experiment, name, files, placement, root, console.print) for name in wanted}
    on_cpu = placement.device.type == "cpu"
    return Plan(stage, files.id, placement.describe(), peak_memory(placement) if on_cpu else None, stages)


def _plan_stage(
    experiment: Experiment,
    stage: Stage,
    files: BaseFiles,
    placement: Placement,
    root: Path,
    say: Callable[[str], None],
) -> StagePlan:
    settings: Sft | Dpo = experiment.sft if stage == "sft" else experiment.dpo
    made = outline(files, experiment, stage, placement.dtype)
    trainable = trainable_of(made.policy)
    rows = count_rows(experiment, stage, files)
    unknown = unknown_length(settings.max_length, dpo=stage == "dpo")
    lengths = rows.lengths or (unknown,) * settings.per_device_train_batch_size
    settings = settle_checkpointing(settings, experiment, files, placement, lengths, say)
    args = _arguments(settings, experiment.seed, placement)
    steps = steps_of(rows.used, args)
    batch = largest_batch(rows, args, dpo=stage == "dpo")
    base = {"id": files.id, "revision": files.revision, "quantize": experiment.model.quantize}
    return StagePlan(
        stage=stage,
        trainable=trainable,
        adapter_rate=settings.learning_rate,
        unfreeze=experiment.unfreeze_of(stage)[0],
        rows=rows,
        steps=steps,
        batch=batch,
        memory=memory_of(made, batch, args, placement, dpo=stage == "dpo"),
        checkpointing=args.activation_checkpointing,
        checkpoints=checkpoints_kept(steps, args),
        speed=measured_speed(root, experiment.name, stage, base, placement.describe()),
    )


def _arguments(settings: Sft | Dpo, seed: int, placement: Placement) -> Any:
    """TRL's configuration of a stage that will not be run."""
    given: dict[str, Any] = {"output": Path(), "seed": seed, "placement": placement, "evaluates": False}
    return sft_config(settings, **given) if isinstance(settings, Sft) else dpo_config(settings, **given)
