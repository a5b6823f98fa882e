"""A run that is killed and resumed ends as one that never stopped: the same adapter, the same record, byte for byte."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

VARIANTS = ("plain", "accumulated", "opened", "sparse-log")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_seeded_kills(arena: Any, tmp_path: Path, stage: str, variant: str) -> None:
    expected, calls = arena.reference(stage, variant), arena.calls(stage, variant)
    choose = random.Random(f"{stage} {variant}")
    for number in range(arena.kills // 8):
        root = tmp_path / str(number)
        at = choose.randrange(calls)
        killed = arena.kill(stage, variant, root, at)
        assert killed.code == -9, killed
        ended = arena.resume(stage, variant, root)
        survived = arena.outcome(stage, variant, root) == expected
        arena.judge("kill at random", f"{stage} {variant} at call {at}: {ended}", survived)
