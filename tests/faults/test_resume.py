"""A run that is killed and resumed ends as one that never stopped: the same adapter, the same record, byte for byte."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import BUILTIN, CELLS, SHARE


@pytest.mark.parametrize(("stage", "variant"), CELLS)
def test_seeded_kills(arena: Any, tmp_path: Path, stage: str, variant: str) -> None:
    expected, calls = arena.reference(stage, variant), arena.calls(stage, variant)
    choose = random.Random(f"{stage} {variant}")
    at = [choose.randrange(calls) for _ in range(SHARE)]
    for call, root in zip(at, arena.kill(stage, variant, tmp_path, at), strict=True):
        ended = arena.resume(stage, variant, root)
        survived = arena.outcome(stage, variant, root) == expected
        arena.judge("kill at random", f"{stage} {variant} at call {call}: {ended}", survived)
        shutil.rmtree(root)


@pytest.mark.skipif(BUILTIN, reason="the built-in model has one variant")
@pytest.mark.parametrize(("stage", "variant"), CELLS)
def test_the_variants_are_what_they_are_called(arena: Any, stage: str, variant: str) -> None:
    arena.reference(stage, variant)
    manifest = json.loads((arena.folder / stage / variant / f"{stage}-001/run.json").read_text())
    if stage == "sft":
        assert manifest["engine"]["padding_free"] is (variant != "padded")
    else:
        assert manifest["engine"]["shared_prompt"]
        assert manifest["engine"]["reference"]["scored"] + manifest["engine"]["reference"]["found"] == 16
        assert (manifest["engine"]["trunk"] is not None) is (variant == "trunk")
    assert ("opened" in manifest["trainable"]["groups"]) is (variant in ("opened", "trunk"))
