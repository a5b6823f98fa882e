"""Two processes of the real command train as one process with twice the batch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.training.processes import join_processes, require_processes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "pipeline")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [*TORCHRUN, *arguments], capture_output=True, text=True, env=environment, timeout=500, check=False
    )


def test_two_processes_train_as_one_with_twice_the_batch(
    train: Any,
    write_experiment: Any,
    settings: dict[str, Any],
    start: Path,
    require_alike: Any,
    trained: Any,
    tmp_path: Path,
) -> None:
    """SFT on 14 rows in steps of 8, whose last is 4 and 2 for the two; DPO on 14 pairs in steps of 14."""
    sizes = {"sft": 4, "dpo": 7}
    single = {
        "sft": train("sft", "single", per_device_train_batch_size=8),
        "dpo": train("dpo", "single", per_device_train_batch_size=14, start=start),
    }
    changes = {stage: {**settings[stage], "per_device_train_batch_size": size} for stage, size in sizes.items()}
    experiment = str(write_experiment(**{**settings, **changes}))
    for stage in sizes:
        more = ["--from", str(start)] if stage == "dpo" else []
        done = torchrun(stage, experiment, "--checkpoints", str(tmp_path / "double"), "--format", "json", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["status"] == "finished"  # one object: the second process prints none
        assert done.stderr.count("processes: 2") == 1
        double = trained(tmp_path / "double" / "lights" / f"{stage}-001")
        require_alike(single[stage], double, 2e-5)
        assert double.manifest["processes"] == 2
        assert double.manifest["status"] == "finished"
    assert [folder.name for folder in sorted((tmp_path / "double" / "lights").iterdir())] == ["dpo-001", "sft-001"]


def test_a_world_that_did_not_come_about_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class One:
        class args:
            world_size = 1

    require_processes(One)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match="started 2 processes, but the trainer runs as one of 1"):
        require_processes(One)


def test_accelerates_lonely_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of the one process that it starts."""
    import torch

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(PipelineError, match="started this one alone"):
        join_processes(torch.device("cpu"), print)


def test_other_commands_are_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["runs", "--checkpoints", str(tmp_path)]) == 2
    assert "several-processes" in capsys.readouterr().err
