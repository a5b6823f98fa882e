"""What differs between runs: experiment, data, versions, results. Reads their records only; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.results import read_comparison
from pipeline.experiment_file import load_experiment
from pipeline.runs.run import Run


def run_differences(runs: Sequence[Run]) -> dict[str, dict[str, list[Any]]]:
    """By part, every key that the runs do not agree on, with each run's value (null where it has none).

    The parts are `experiment`, `data`, `versions` and `results`. Of the experiment, paths of data are left out:
    `data` compares what lies there by its hash.
    """
    parts: dict[str, list[dict[str, Any]]] = {
        "experiment": [_experiment(run) for run in runs],
        "data": [_data(run) for run in runs],
        "versions": [_versions(run) for run in runs],
        "results": [_results(run) for run in runs],
    }
    return {part: disagreements(values) for part, values in parts.items()}


def disagreements(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys on which the mappings differ, in the order in which they come, with each one's value."""
    keys = dict.fromkeys(key for value in values for key in value)
    found = {key: [value.get(key) for value in values] for key in keys}
    return {key: row for key, row in found.items() if any(value != row[0] for value in row)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists are values."""
    if not isinstance(value, dict):
        return {prefix: value}
    dotted = prefix + "." if prefix else ""
    return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{dotted}{name}").items()}


def _experiment(run: Run) -> dict[str, Any]:
    resolved = load_experiment(run.path / "experiment.yaml").experiment.model_dump(mode="json")
    leaves = flat(resolved)
    return {key: value for key, value in leaves.items() if not (key.startswith("data.") and _is_path(value))}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value


def _data(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in run.manifest.get("data", []):
        name = f"{entry.get('kind', 'data')}.{entry.get('use', Path(str(entry.get('path'))).name)}"
        found |= {f"{name}.{key}": entry.get(key) for key in ("sha256", "rows")}
        found |= {f"{name}.{key}": entry.get("tokens", {}).get(key) for key in ("used", "tokens", "loss_tokens")}
    return found


def _versions(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    own = {
        "base": manifest.get("base", {}),
        "parent": manifest.get("parent"),
        "device": manifest.get("device"),
        "git": manifest.get("git") or {},
        "template": manifest.get("tokenizer", {}).get("template_sha256"),
        "adapter": manifest.get("adapter", {}).get("sha256"),
    }
    return {**flat(own), **manifest.get("versions", {})}


def _results(run: Run) -> dict[str, Any]:
    clock = ("runtime", "per_second")
    metrics = {key: value for key, value in run.manifest.get("metrics", {}).items() if not key.endswith(clock)}
    return {"status": run.status, **metrics, **_compared(run)}


def _compared(run: Run) -> dict[str, Any]:
    """The run's figures in its own comparison."""
    compared = read_comparison(run.path) or {}
    name = next((name for name, one in compared.get("versions", {}).items() if one.get("run") == run.name), None)
    figures = {} if name is None else compared["metrics"].get(name, {})
    return {f"compare/{metric}": figure["value"] for metric, figure in figures.items()}
