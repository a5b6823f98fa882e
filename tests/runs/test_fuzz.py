"""Whatever stands in the files that a run leaves, reading them gives a message or success: no traceback, no hang."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.runs.checkpoints import CHECKPOINT_MANIFEST, find_checkpoint
from pipeline.runs.run import MANIFEST, find_run, list_runs, read_run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["name", "seed", "model", "data", "sft", "dpo", "scope", "lora", "evaluation", "unfreeze", "id"])
YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5),
    max_leaves=12,
)
FEW = settings(max_examples=60, deadline=None)


@FEW
@given(st.binary(max_size=300) | YAML.map(lambda value: json.dumps(value).encode()))
def test_an_experiment_file_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        path.write_bytes(content)
        try:
            assert load_experiment(path).experiment.name
        except PipelineError as refused:
            assert refused.mend  # noqa: PT017


@FEW
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
def test_a_manifest_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "lights/sft-001"
        run.mkdir(parents=True)
        (run / MANIFEST).write_bytes(content)
        listed = list_runs(Path(folder))
        try:
            assert [read_run(run).name] == [one.name for one in listed]
        except PipelineError as refused:
            assert refused.code == "damaged-run"  # noqa: PT017
            assert listed == []


@FEW
@given(st.text(max_size=80))
def test_a_runs_name_finds_or_is_refused(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            find_run(Path(folder), name)
        except PipelineError as refused:
            assert refused.code == "no-such-run"  # noqa: PT017


@FEW
@given(JSON | st.fixed_dictionaries({"step": JSON, "files": st.dictionaries(st.text(max_size=8), JSON, max_size=3)}))
def test_a_checkpoints_manifest_holds_or_is_passed_over(body: Any) -> None:
    """Also one that somebody has sealed anew, so that its hash holds."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint-3"
        checkpoint.mkdir()
        if isinstance(body, dict):
            body = {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}
        (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps(body))
        search = find_checkpoint(Path(folder), Path(folder) / "metrics.jsonl")
        assert search.checkpoint is None
        assert [name for name, _ in search.passed_over] == ["checkpoint-3"]
