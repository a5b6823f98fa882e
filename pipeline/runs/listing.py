"""`pipeline runs`: every run in a row, with its best figures; filtered, sorted, and set against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.results import read_comparison
from pipeline.runs.lock import is_locked
from pipeline.runs.metrics import read_metrics
from pipeline.runs.run import Run, list_runs

_BEST: dict[str, Callable[[list[float]], float]] = {
    "eval_loss": min,
    "eval_rewards/accuracies": max,
    "eval_rewards/margins": max,
}
"""The metrics of a run's own evaluations that are listed, and which of several is the best."""
SORTS = {
    "name": None,
    "start": "start",
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "checks": "checks_passed",
}
"""What `--sort` takes, and the key that it sorts by."""
DEAD = "dead"
"""The status of a run whose process ended without a word: killed, or with its machine."""
_FALLING = ("accuracy", "margin", "checks")
"""Sorted with the highest first."""


def listed(
    root: Path,
    *,
    experiment: str | None = None,
    stage: str | None = None,
    status: str | None = None,
    sort: str = "name",
    reverse: bool = False,
) -> list[dict[str, Any]]:
    """The runs under `root` as plain values, best first where they are sorted by a figure.

    Runs that lack the figure come last, either way.
    """
    runs = [
        run
        for run in list_runs(root, experiment)
        if (stage is None or run.stage == stage) and (status is None or status_of(run) == status)
    ]
    rows = [summary_of(run) for run in runs]
    key = SORTS[sort]
    if key is None:
        return rows[::-1] if reverse else rows
    figures = [row["start"] if key == "start" else row["best"].get(key) for row in rows]
    known = [at for at, figure in enumerate(figures) if figure is not None]
    known.sort(key=lambda at: figures[at], reverse=(sort in _FALLING) is not reverse)
    return [rows[at] for at in known] + [rows[at] for at, figure in enumerate(figures) if figure is None]


def summary_of(run: Run) -> dict[str, Any]:
    """One run as `pipeline runs --format json` prints it."""
    manifest = run.manifest
    keys = ("stage", "experiment", "start", "end", "parent", "metrics", "trainable")
    best: dict[str, float] = {}
    lines = read_metrics(run)
    for name, choose in _BEST.items():
        values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        if values:
            best[name] = choose(values)
    passed = checks_passed(run)
    if passed is not None:
        best["checks_passed"] = passed
    return {
        "run": str(run.path),
        "name": run.name,
        "base": manifest.get("base", {}).get("id"),
        "status": status_of(run),
        **{key: manifest.get(key) for key in keys},
        "best": best,
    }


def status_of(run: Run) -> str:
    """The manifest's status; `dead` where that says `running` and no process writes to the run any more."""
    return DEAD if run.status == "running" and not is_locked(run.path) else run.status


def checks_passed(run: Run) -> float | None:
    """The run's score in its own comparison (`evaluation.verdict`); None where it has none."""
    compared = read_comparison(run.path) or {}
    name = next((name for name, one in compared.get("versions", {}).items() if one.get("run") == run.name), None)
    score = ((compared.get("verdict") or {}).get("scores") or {}).get(name)
    return None if score is None else float(score["value"])


def print_runs(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table of `pipeline runs`; its figures are of held-out rows, the best of the run."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "status", "started"):
        table.add_column(heading, no_wrap=True)
    for heading in ("base", "trains"):
        table.add_column(heading, overflow="fold", min_width=6)
    for heading in ("loss", "accuracy", "margin", "checks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        best, start, base = row["best"], str(row["start"] or ""), str(row["base"] or "")
        table.add_row(
            *map(Text, (row["name"], row["status"], start[:16].replace("T", " "), base.rsplit("/", 1)[-1])),
            Text(_scope(row["trainable"])),
            _figure(best.get("eval_loss"), "{:.3f}"),
            _figure(best.get("eval_rewards/accuracies"), "{:.0%}"),
            _figure(best.get("eval_rewards/margins"), "{:.3f}"),
            _figure(best.get("checks_passed"), "{:.0%}"),
        )
    console.print(table)
    for row in rows:
        if row["status"] == DEAD:
            stage, name = row["stage"], Path(row["run"]).name
            console.print(
                f"{row['name']} is dead, its process is gone: `pipeline {stage} EXPERIMENT --resume {name}` goes on",
                highlight=False,
            )


def _scope(trainable: dict[str, Any] | None) -> str:
    if not trainable:
        return ""
    opened = " +opened" if "opened" in trainable.get("groups", {}) else ""
    return f"{trainable['trainable_percent']:.2g} %{opened}"


def _figure(value: float | None, form: str) -> Text:
    return Text("-", style="dim") if value is None else Text(form.format(value))


def print_differences(names: Sequence[str], parts: dict[str, dict[str, list[Any]]], console: Console) -> None:
    """What `runs diff` found, a table for each part."""
    for part, rows in parts.items():
        if not rows:
            console.print(Text(f"{part}: no difference", style="dim"))
            continue
        table = Table(title=part, title_justify="left", box=None, pad_edge=False)
        for heading in ("", *names):
            table.add_column(Text(heading), overflow="fold")
        for key, values in rows.items():
            table.add_row(Text(key), *(Text(shown_value(value)) for value in values))
        console.print(table)


def shown_value(value: Any) -> str:
    """A value of an experiment or a manifest in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
