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

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
STOPPED = """
import os, signal, sys
from pipeline.cli import main
from pipeline.training.keeper import Resumable

training_step = Resumable.training_step

def signalled(trainer, *given, **more):
    if os.environ["RANK"] == "1" and trainer.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return training_step(trainer, *given, **more)

Resumable.training_step = signalled
sys.exit(main(sys.argv[1:]))
"""
"""The command, whose second process is asked to stop within its third step."""


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
    """14 rows in steps of 8, whose last is 4 and 2 for the two; SFT is stopped by a signal to one, and resumed.

    All that makes the engine fast is on: batches without padding, joint rows, the kept reference.
    """
    single = {
        "sft": train("sft", "single", per_device_train_batch_size=8),
        "dpo": train("dpo", "single", per_device_train_batch_size=8, start=start),
    }
    halves = {stage: {**settings[stage], "per_device_train_batch_size": 4} for stage in single}
    experiment = str(write_experiment(**{**settings, **halves}))
    where = ("--checkpoints", str(tmp_path / "double"), "--format", "json")
    (tmp_path / "stopped.py").write_text(STOPPED)
    stopped = torchrun(str(tmp_path / "stopped.py"), "sft", experiment, *where)
    assert "interrupted at step 3 of 6, with a checkpoint of step 3" in stopped.stdout, stopped.stderr[-3000:]
    for stage, more in (("sft", ["--resume"]), ("dpo", ["--from", str(start)])):
        done = torchrun("-m", "pipeline", stage, experiment, *where, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["status"] == "finished"  # one object: the second process prints none
        assert done.stderr.count("processes: 2") == 1
        double = trained(tmp_path / "double" / "lights" / f"{stage}-001")
        assert double.manifest["processes"] == double.manifest["placement"]["world_size"] == 2
        engine = double.manifest["engine"]
        assert engine["padding_free"] if stage == "sft" else engine["shared_prompt"]
        assert stage == "sft" or engine["reference"]["scored"] + engine["reference"]["found"] == 14
        assert len(double.losses) == 6
        require_alike(single[stage], double, 2e-5)
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
