"""How fast earlier runs went: the only ground on which a time is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runs.run import Run, Stage, list_runs


@dataclass(frozen=True)
class Speed:
    """A finished run of the same stage, base and device."""

    run: str
    """`<experiment>/<stage>-001`."""
    tokens_per_second: float
    """Of the whole training loop, evaluations and checkpoints included."""


def measured_speed(root: Path, experiment: str, stage: Stage, base: dict[str, Any], device: str) -> Speed | None:
    """The speed of the newest run to go by, one of the same experiment if there is one.

    Args:
        root: where runs live.
        experiment: its name.
        stage: `sft` or `dpo`.
        base: `id`, `revision` and `quantize`, as a manifest has them.
        device: as `Placement.describe` says it.
    """
    found: list[tuple[bool, str, Speed]] = []
    for run in list_runs(root):
        metrics = run.manifest.get("metrics") or {}
        tokens, seconds = metrics.get("num_tokens"), metrics.get("train_runtime")
        if run.status == "finished" and _alike(run, stage, base, device) and tokens and seconds:
            own = run.manifest.get("experiment") == experiment
            found.append((own, str(run.manifest.get("start")), Speed(run.name, tokens / seconds)))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def _alike(run: Run, stage: Stage, base: dict[str, Any], device: str) -> bool:
    manifest = run.manifest
    theirs = manifest.get("base") or {}
    same_base = all(theirs.get(key) == value for key, value in base.items())
    return manifest["stage"] == stage and manifest.get("device") == device and same_base
