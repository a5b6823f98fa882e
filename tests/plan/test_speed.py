from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.plan.speed import measured_speed
from pipeline.runs.run import Run, create_run

BASE = {"id": "someone/model", "revision": None, "quantize": "none"}
DEVICE = "CPU (2 threads), float32"


def finished(root: Path, tokens: float, start: str, *, name: str = "triage", stage: Any = "sft", **more: Any) -> Run:
    """A run that trained on so many tokens in ten seconds."""
    metrics = {"num_tokens": tokens, "train_runtime": 10.0}
    manifest = {"base": {**BASE, "sha256": "…"}, "device": DEVICE, "metrics": metrics, **more}
    run = create_run(root, name, stage, "name: triage\n", manifest)
    run.end("finished", start=start)
    return run


def test_the_newest_run_of_the_same_experiment_goes_before_others(tmp_path: Path) -> None:
    finished(tmp_path, 1000, "2026-01-01T00:00:00+00:00")
    finished(tmp_path, 2000, "2026-01-02T00:00:00+00:00")
    finished(tmp_path, 3000, "2026-01-03T00:00:00+00:00", name="other")
    speed = measured_speed(tmp_path, "triage", "sft", BASE, DEVICE)
    assert speed is not None
    assert (speed.run, speed.tokens_per_second) == ("triage/sft-002", 200.0)
    another = measured_speed(tmp_path, "new", "sft", BASE, DEVICE)
    assert another is not None
    assert (another.run, another.tokens_per_second) == ("other/sft-001", 300.0)


def test_runs_of_another_stage_base_or_device_or_without_an_end_tell_nothing(tmp_path: Path) -> None:
    start = "2026-01-01T00:00:00+00:00"
    finished(tmp_path, 1000, start, stage="dpo")
    finished(tmp_path, 1000, start, device="CUDA (NVIDIA H100, 80 GiB), bfloat16")
    finished(tmp_path, 1000, start, base={**BASE, "quantize": "nf4"})
    finished(tmp_path, 1000, start, base={**BASE, "id": "someone/other"})
    finished(tmp_path, 1000, start, metrics={})
    finished(tmp_path, 1000, start).update(status="interrupted")
    assert measured_speed(tmp_path, "triage", "sft", BASE, DEVICE) is None
    assert measured_speed(tmp_path / "nothing", "triage", "sft", BASE, DEVICE) is None
