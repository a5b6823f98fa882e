"""From `metrics.jsonl` to charts: which metrics go together, one chart for each stage and group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.runs.metrics import read_metrics
from pipeline.runs.run import Run

MOST_POINTS = 1500
"""Steps in one chart; of more, every so-manieth is drawn."""

_GROUPS = {
    "sft": (
        ("loss", ("loss", "eval_loss")),
        ("token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy")),
        ("learning rate", ("learning_rate", "learning_rate/opened")),
    ),
    "dpo": (
        ("loss", ("loss", "eval_loss")),
        ("reward margin", ("rewards/margins", "eval_rewards/margins")),
        ("rewards", ("rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected")),
        ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
        ("log-probabilities, nats", ("logps/chosen", "logps/rejected", "eval_logps/chosen", "eval_logps/rejected")),
        ("learning rate", ("learning_rate", "learning_rate/opened")),
    ),
}


@dataclass(frozen=True)
class Series:
    """One metric of one run, a value or None for each step of its chart."""

    label: str
    values: list[float | None]
    held_out: bool
    """Evaluations are few: they are drawn as points."""


@dataclass(frozen=True)
class Chart:
    """What is drawn in one frame."""

    id: str
    title: str
    steps: list[int]
    series: list[Series]
    thinned: int
    """How many steps stand behind each one that is drawn."""

    @property
    def summary(self) -> str:
        """The chart in words, for whoever cannot see it."""
        parts = []
        for one in self.series:
            known = [(step, value) for step, value in zip(self.steps, one.values, strict=True) if value is not None]
            (first, start), (last, end) = known[0], known[-1]
            parts.append(
                f"{one.label}: {start:.4g} at step {first}" + (f", {end:.4g} at step {last}" if last > first else "")
            )
        return f"{self.title}. " + "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """What the page's script draws."""
        series = [{"label": one.label, "values": one.values, "points": one.held_out} for one in self.series]
        return {"id": self.id, "title": self.title, "steps": self.steps, "series": series}


def charts_of(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Charts by stage, `sft` before `dpo`; runs of one stage share a frame.

    A metric that no step of a run has is left out, a chart without any metric too.
    """
    found: dict[str, list[Chart]] = {}
    for stage, groups in _GROUPS.items():
        rows = {run.path.name: read_metrics(run) for run in runs if run.stage == stage}
        charts = [
            chart
            for title, names in groups
            if (chart := _chart(f"{stage}-{_id(title)}", title, names, rows)) is not None
        ]
        if charts:
            found[stage] = charts
    return found


def _id(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title)


def _chart(id: str, title: str, names: Sequence[str], rows: dict[str, list[dict[str, Any]]]) -> Chart | None:
    values: dict[str, dict[int, float]] = {}
    held_out: dict[str, bool] = {}
    for run, lines in rows.items():
        for name in names:
            label = name if len(rows) == 1 else f"{run} {name}"
            known = {line["step"]: float(line[name]) for line in lines if _number(line.get(name))}
            if known:
                values[label], held_out[label] = known, name.startswith("eval_")
    if not values:
        return None
    steps = sorted({step for known in values.values() for step in known})
    every = math.ceil(len(steps) / MOST_POINTS)
    # Evaluations are few and stay; so do the first step and the last.
    kept = {step for label, known in values.items() if held_out[label] for step in known}
    steps = [step for at, step in enumerate(steps) if at % every == 0 or step in kept or step == steps[-1]]
    series = [Series(label, [known.get(step) for step in steps], held_out[label]) for label, known in values.items()]
    return Chart(id, title, steps, series, every)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
