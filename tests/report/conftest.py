"""Two runs on the disk, and their comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.run import Run, read_run
from tests.records import comparison, write_runs


@pytest.fixture
def compared() -> dict[str, Any]:
    return comparison()


@pytest.fixture
def root(tmp_path: Path, compared: dict[str, Any]) -> Path:
    """A folder of runs."""
    write_runs(tmp_path / "checkpoints", compared)
    return tmp_path / "checkpoints"


@pytest.fixture
def dpo(root: Path) -> Run:
    return read_run(root / "lights" / "dpo-001")
