"""A plan for a person to read."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.plan.plan import Plan, StagePlan
from pipeline.training.account import say_trainable

_PARTS = {
    "weights": "base weights",
    "adapter_and_opened": "adapter and opened weights",
    "gradients": "their gradients",
    "optimizer": "AdamW's moments",
    "reference": "the reference's own copies",
    "logits": "logits at the head",
    "activations": "activations",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Prints every stage that was planned, in the order in which they run."""
    console.print(f"base: {plan.base}; device: {plan.device}; no weights were loaded", highlight=False)
    for stage in plan.stages.values():
        console.rule({"sft": "phase one: SFT", "dpo": "phase two: DPO"}[stage.stage])
        say_trainable(console, stage.trainable, stage.adapter_rate, stage.unfreeze)
        console.print("\n".join(stage.rows.account), highlight=False)
        console.print(_steps(stage), highlight=False)
        _print_memory(stage, plan.process_bytes, console)
        console.print(_disk(stage), highlight=False)
        console.print(_time(stage), highlight=False)


def _steps(stage: StagePlan) -> str:
    steps = stage.steps
    if steps.total is None:
        return "steps: not known without the rows"
    if steps.epochs is None:
        return f"steps: {steps.total:,}"
    return f"steps: {steps.total:,} ({steps.per_epoch:,} an epoch, {steps.epochs:.2f} epochs)"


def _print_memory(stage: StagePlan, process: int | None, console: Console) -> None:
    memory, batch = stage.memory, stage.batch
    without = "without padding" if memory.without_padding else "padded as TRL pads it"
    if memory.without_padding and stage.stage == "dpo":
        without += ", what two completions share only once"
    table = Table(title="memory", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, size in memory.parts().items():
        if size != 0:
            table.add_row(_PARTS[part], _size(size))
    table.add_row("together", _size(memory.total))
    console.print(table)
    console.print(
        f"for the largest batch, {batch.sequences} sequences of up to {batch.length:,} tokens: "
        f"{stage.computed.tokens:,} tokens {without}, {batch.positions:,} in the loss"
        + ("" if stage.rows.lengths else " (the rows' lengths are not known: max_length stands in for them)"),
        highlight=False,
    )
    if memory.why_unknown is not None:
        console.print(memory.why_unknown, highlight=False)
    if process is not None:
        console.print(f"beside it the process itself: {_size(process)}", highlight=False)


def _disk(stage: StagePlan) -> str:
    disk = stage.as_dict()["disk"]
    kept = disk["checkpoints_kept"]
    text = f"disk: adapter {_size(disk['adapter'])}"
    if kept is None:
        return f"{text}, each checkpoint {_size(disk['checkpoint'])}"
    many = "checkpoint" if kept == 1 else "checkpoints"
    return f"{text}, {kept} {many} of {_size(disk['checkpoint'])}, together {_size(disk['total'])}"


def _time(stage: StagePlan) -> str:
    if stage.speed is None:
        return "time: no finished run on this device to go by"
    speed = f"{stage.speed.tokens_per_second:,.0f} tokens/s in {stage.speed.run}"
    if stage.seconds is None:
        return f"time: not known without the rows ({speed})"
    minutes, seconds = divmod(round(stage.seconds), 60)
    return f"time: {minutes // 60}:{minutes % 60:02}:{seconds:02}, at {speed}"


def _size(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
