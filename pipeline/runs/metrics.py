"""Reading a run's `metrics.jsonl`."""

from __future__ import annotations

import json
from typing import Any

from pipeline.runs.run import Run


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that an interruption cut off is left out."""
    try:
        lines = run.metrics_file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found
