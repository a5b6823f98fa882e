"""The commands as they are typed: stopped at any of their stages, told to go on, out of memory."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model.adapter import adapter_sha256
from pipeline.runs.checkpoints import checkpoint_folders, problem_of
from pipeline.runs.lock import is_locked
from tests.faults.conftest import left
from tests.faults.test_damage import kill_at_step

KILLED = -signal.SIGKILL


def before(place: str, act: Callable[[], None], *, after: bool = False) -> Callable[[], None]:
    """A hook that does something before a function, or behind it, each time it is called; `place` is `module:name`."""

    def hook() -> None:
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for one in owners:
            owner = getattr(owner, one)
        stock = getattr(owner, name)

        def acting(*given: Any, **more: Any) -> Any:
            if not after:
                act()
            result = stock(*given, **more)
            if after:
                act()
            return result

        setattr(owner, name, acting)

    return hook


def send(*numbers: int) -> Callable[[], None]:
    """Sends this process signals, the first time."""
    left_to_send = list(numbers)

    def act() -> None:
        while left_to_send:
            os.kill(os.getpid(), left_to_send.pop(0))

    return act


def fail(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def test_sft_resume_and_accepted_changes(arena: Any, tmp_path: Path) -> None:
    expected, file = arena.reference("sft", "plain"), arena.file("plain")
    command = ("sft", file, "--checkpoints", str(tmp_path), "--format", "json")
    assert arena.command(*command, hook=kill_at_step(4)).code == KILLED
    run = tmp_path / "plain/sft-001"
    listed = json.loads(arena.command("runs", "--checkpoints", str(tmp_path), "--format", "json").message)["runs"]
    assert [row["status"] for row in listed] == ["dead"]
    changed = (*command, "--resume", "--set", "sft.learning_rate=0.01")
    refused = arena.command(*changed)
    error = json.loads(refused.message)["errors"][0]
    assert (refused.code, error["code"]) == (2, "changed-since")
    assert "`sft.learning_rate`: 0.05 then, 0.01 now" in error["message"]
    assert "--accept-changes" in error["mend"]
    resumed = arena.command(*command, "--resume")
    assert resumed.code == 0, resumed
    assert json.loads(resumed.message)["run"] == str(run)
    arena.judge("command", f"sft --resume: {resumed}", left(run) == expected)
    # Another run of it, changed in the middle.
    assert arena.command(*command, hook=kill_at_step(4)).code == KILLED
    accepted = arena.command(*changed, "--accept-changes")
    assert accepted.code == 0, accepted
    entry = manifest(tmp_path / "plain/sft-002")["resumed"][0]
    assert (entry["step"], entry["changes"]) == (4, [{"what": "`sft.learning_rate`", "then": 0.05, "now": 0.01}])
    assert left(tmp_path / "plain/sft-002").adapter != expected.adapter
    nothing = arena.command(*command, "--resume")
    assert (nothing.code, json.loads(nothing.message)["errors"][0]["code"]) == (2, "nothing-to-resume")


def retrain(run: Path) -> None:
    """Gives a run another adapter, and a manifest that says so."""
    weights = run / "adapter/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told = manifest(run)
    told["adapter"]["sha256"] = adapter_sha256(run / "adapter")
    (run / "run.json").write_text(json.dumps(told))


def test_dpo_resume(arena: Any, tmp_path: Path) -> None:
    expected, root = arena.reference("dpo", "plain"), arena.start("dpo", "plain", tmp_path)
    command = ("dpo", arena.file("plain"), "--checkpoints", str(root), "--format", "json")
    assert arena.command(*command, hook=kill_at_step(4)).code == KILLED
    refused = arena.command(*command, "--resume", "--set", "dpo.beta=0.3")
    assert "`dpo.beta`: 0.1 then, 0.3 now" in json.loads(refused.message)["errors"][0]["message"]
    # A newer SFT run is not what this one was started with; and what it was started with must be what it was.
    another = root / "plain/sft-002"
    shutil.copytree(root / "plain/sft-001", another)
    retrain(another)
    before = {path: path.read_bytes() for path in (root / "plain/sft-001").rglob("*") if path.is_file()}
    retrain(root / "plain/sft-001")
    refused = arena.command(*command, "--resume")
    assert json.loads(refused.message)["errors"][0]["code"] == "adapter-changed"
    for path, content in before.items():
        path.write_bytes(content)
    resumed = arena.command(*command, "--resume", "dpo-001")
    assert resumed.code == 0, resumed
    arena.judge("command", f"dpo --resume: {resumed}", left(root / "plain/dpo-001") == expected)


def test_align_goes_on_wherever_it_was_killed(arena: Any, tmp_path: Path) -> None:
    """In SFT, between the phases, in DPO, in the comparison: what was finished is kept, to the byte."""
    expected = [arena.reference(stage, "plain") for stage in ("sft", "dpo")]
    command = ("align", arena.file("plain"), "--checkpoints", str(tmp_path))
    kill = send(signal.SIGKILL)
    assert arena.command(*command, hook=kill_at_step(4)).code == KILLED
    assert arena.command(*command, "--resume", hook=before("pipeline.align:run_dpo", kill)).code == KILLED
    begun = manifest(tmp_path / "plain/sft-001")
    assert (begun["status"], begun["resumed"][0]["step"]) == ("finished", 4)
    assert arena.command(*command, "--resume", hook=kill_at_step(4)).code == KILLED
    assert arena.command(*command, "--resume", hook=before("pipeline.align:compare_runs", kill)).code == KILLED
    assert manifest(tmp_path / "plain/sft-001") == begun
    assert manifest(tmp_path / "plain/dpo-001")["resumed"][0]["step"] == 4
    assert not (tmp_path / "plain/dpo-001/compare.json").exists()
    done = arena.command(*command, "--resume")
    assert done.code == 0, done
    assert "sft-001 is finished" in done.message
    assert "dpo-001 is finished" in done.message
    assert json.loads((tmp_path / "plain/dpo-001/compare.json").read_text())["models"] == ["base", "sft", "dpo"]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["dpo-001", "sft-001"]
    survived = [left(tmp_path / f"plain/{stage}-001") for stage in ("sft", "dpo")] == expected
    arena.judge("command", "align --resume", survived)


@pytest.mark.parametrize(
    ("place", "number", "status"),
    [
        ("pipeline.training.sft:load_base", signal.SIGTERM, None),
        ("pipeline.training.sft:build_trainer", signal.SIGUSR1, "interrupted"),
        ("pipeline.training.sft:save_adapter", signal.SIGTERM, "interrupted"),
        ("pipeline.training.sft:hashes_of", signal.SIGINT, "interrupted"),
    ],
    ids=["loading", "preparing", "before the adapter", "behind the adapter"],
)
def test_a_signal_outside_the_loop_ends_the_command_at_once(
    arena: Any, tmp_path: Path, place: str, number: int, status: str | None
) -> None:
    ended = arena.command("sft", arena.file("plain"), "--checkpoints", str(tmp_path), hook=before(place, send(number)))
    assert ended.code == 3, ended
    runs = list(tmp_path.glob("plain/sft-*"))
    assert [manifest(run)["status"] for run in runs] == ([] if status is None else [status])
    assert not any(is_locked(run) for run in runs)
    if "adapter" in place or "hashes" in place:  # trained to the end: what is left is done by --resume
        again = arena.command("sft", arena.file("plain"), "--checkpoints", str(tmp_path), "--resume")
        assert again.code == 0, again
        arena.judge("signal", f"{place}: {again}", left(runs[0]) == arena.reference("sft", "plain"))


@pytest.mark.parametrize(
    ("place", "numbers", "goes_on"),
    [
        ("pipeline.training.keeper:Keeper._write", [signal.SIGUSR1], True),
        ("pipeline.training.keeper:Keeper._write", [signal.SIGTERM, signal.SIGTERM], False),
        ("pipeline.training.watch.samples:generate", [signal.SIGTERM], True),
    ],
    ids=["saving", "saving, twice", "sampling"],
)
def test_a_signal_while_saving_or_sampling(
    arena: Any, tmp_path: Path, place: str, numbers: list[int], goes_on: bool
) -> None:
    command = ("sft", arena.file("plain"), "--checkpoints", str(tmp_path))
    stopped = arena.command(*command, hook=before(place, send(*numbers)))
    assert stopped.code == 3, stopped
    run = tmp_path / "plain/sft-001"
    assert manifest(run)["status"] == "interrupted"
    folders = checkpoint_folders(run / "state")
    assert [problem_of(folder) for folder in folders] == [None] * len(folders)
    assert not list((run / "state").glob(".*"))
    if not goes_on:
        assert not folders
        assert "start it again" in stopped.said
        return
    again = arena.command(*command, "--resume")
    assert again.code == 0, again
    arena.judge("signal", f"{place}: {again}", left(run) == arena.reference("sft", "plain"))


def test_a_signal_in_the_comparison_leaves_none(arena: Any, tmp_path: Path) -> None:
    root = arena.start("dpo", "plain", tmp_path)
    arena.reference("sft", "plain")
    hook = before("pipeline.evaluation.runs:compare", send(signal.SIGTERM))
    ended = arena.command("compare", "plain/sft-001", "--checkpoints", str(root), hook=hook)
    assert ended.code == 3, ended
    assert not (root / "plain/sft-001/compare.json").exists()


@pytest.mark.parametrize(
    ("place", "error", "doing"),
    [
        ("transformers:AutoModelForCausalLM.from_pretrained", MemoryError(), "loading the model"),
        (
            "pipeline.training.sft:_Trainer.prediction_step",
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            "training",
        ),
        (
            "pipeline.training.engine.demonstrations:DemonstrationTrainer.compute_loss",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "training",
        ),
    ],
    ids=["loading", "evaluating", "halves of one row"],
)
def test_out_of_memory_is_told_with_the_plans_figures(
    arena: Any, tmp_path: Path, place: str, error: Exception, doing: str
) -> None:
    file = arena.file("plain")
    command = ("sft", file, "--checkpoints", str(tmp_path), "--format", "json")
    if "compute_loss" in place:  # of which evaluations would make use first
        command = (*command, "--set", "sft.eval_strategy=no")
    ended = arena.command(*command, hook=before(place, fail(error)))
    assert ended.code == 4, ended
    assert ("each micro-batch is cut in 4" in ended.said) is ("compute_loss" in place)
    told = json.loads(ended.message)["errors"][0]
    assert told["code"] == "out-of-memory"
    assert f"for {doing}: the plan counts " in told["message"]
    assert " GiB were free before it" in told["message"]
    assert "nf4" in told["mend"]
    for run in tmp_path.glob("plain/sft-*"):
        assert manifest(run)["status"] == "failed"
        assert manifest(run)["error"]["message"] == told["message"]


def test_out_of_memory_and_a_full_disk_in_other_commands(arena: Any, tmp_path: Path) -> None:
    root = arena.start("dpo", "plain", tmp_path)
    for error, code in ((torch.OutOfMemoryError("out of memory"), "out-of-memory"), (OSError(28, "full"), "disk")):
        hook = before("pipeline.evaluation.runs:compare", fail(error))
        ended = arena.command("compare", "plain/sft-001", "--checkpoints", str(root), "--format", "json", hook=hook)
        assert (ended.code, json.loads(ended.message)["errors"][0]["code"]) == (4, code)
