"""Several processes of one run: stopped, killed, resumed. Forked, and joined by gloo as `torchrun` joins them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.checkpoints import checkpoint_folders, problem_of
from pipeline.runs.resume import Resume
from tests.faults.conftest import Ended, Left, left

HALF = {"per_device_train_batch_size": 2}
"""Two processes of it make the steps of one process of four."""


def at_training_step(step: int, number: int) -> Callable[[], None]:
    """Sends the process a signal within the step that follows `step` finished ones."""

    def hook() -> None:
        from pipeline.training.keeper import Resumable

        training_step = Resumable.training_step

        def signalled(trainer: Any, *given: Any, **more: Any) -> Any:
            if trainer.state.global_step == step:
                os.kill(os.getpid(), number)
            return training_step(trainer, *given, **more)

        Resumable.training_step = signalled

    return hook


def while_saving(step: int) -> Callable[[], None]:
    """Kills the process with a checkpoint half written."""

    def hook() -> None:
        from pipeline.training.keeper import Keeper

        write = Keeper._write

        def deadly(keeper: Any, *given: Any) -> None:
            write(keeper, *given)
            if keeper._trainer.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        Keeper._write = deadly

    return hook


def in_evaluation(batch: int) -> Callable[[], None]:
    """Asks the process to stop at one of its batches of evaluation, counted from 1."""

    def hook() -> None:
        from pipeline.training.watch.evaluation import UnfeltEvaluation

        evaluated = 0

        def predicted(trainer: Any, *given: Any, **more: Any) -> Any:
            nonlocal evaluated
            evaluated += 1
            if evaluated == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return super(UnfeltEvaluation, trainer).prediction_step(*given, **more)

        UnfeltEvaluation.prediction_step = predicted

    return hook


def changes(stage: str, **more: Any) -> dict[str, Any]:
    return {"changes": {stage: {**HALF, "logging_steps": 3, "per_device_eval_batch_size": 1, **more}}}


@pytest.fixture(scope="session")
def whole(arena: Any) -> Callable[[str], Left]:
    """What two processes leave that nothing happens to; dropout is on in SFT, and a save falls between two logged
    steps, so that each process has generators and sums of its own."""
    known: dict[str, Left] = {}

    def reference(stage: str) -> Left:
        if stage not in known:
            arena.reference("sft", "plain")
            root = arena.start(stage, "plain", arena.folder / f"two-{stage}")
            both = arena.run_processes(stage, "plain", root, [None, None], **changes(stage))
            assert [one.code for one in both] == [0, 0], both
            known[stage] = left(root / f"plain/{stage}-001")
            manifest = json.loads((root / f"plain/{stage}-001/run.json").read_text())
            assert manifest["processes"] == manifest["placement"]["world_size"] == 2
        return known[stage]

    return reference


def resume(arena: Any, stage: str, root: Path) -> list[Ended]:
    both: list[Ended] = arena.run_processes(stage, "plain", root, [None, None], resume=Resume(), **changes(stage))
    return both


FAULTS = {
    "the second is killed": ("sft", [None, at_training_step(4, signal.SIGKILL)]),
    "the second is killed in DPO": ("dpo", [None, at_training_step(4, signal.SIGKILL)]),
    "the first is killed while saving": ("sft", [while_saving(4), None]),
    "one is asked to stop": ("sft", [None, at_training_step(2, signal.SIGTERM)]),
    "one is asked to stop in an evaluation": ("sft", [None, in_evaluation(3)]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_two_processes_are_stopped_and_resumed(arena: Any, whole: Any, tmp_path: Path, fault: str) -> None:
    stage, hooks = FAULTS[fault]
    expected, root = whole(stage), arena.start(stage, "plain", tmp_path / "runs")
    both = arena.run_processes(stage, "plain", root, hooks, **changes(stage))  # and the other one ends
    run = root / f"plain/{stage}-001"
    if "asked" in fault:
        assert [(one.code, one.error) for one in both] == [(3, "interrupted")] * 2, both
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    else:
        survivor = both[0] if both[1].code == -signal.SIGKILL else both[1]
        assert sorted(one.code for one in both)[0] == -signal.SIGKILL
        assert (survivor.code, survivor.error) == (4, "process-lost"), survivor
    folders = checkpoint_folders(run / "state")
    assert folders
    assert [problem_of(folder) for folder in folders] == [None] * len(folders)
    again = resume(arena, stage, root)
    survived = [one.code for one in again] == [0, 0] and left(run) == expected
    arena.judge("two processes", f"{fault}: {again}", survived)


def test_another_number_of_processes_is_refused_unless_accepted(arena: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    arena.run_processes("sft", "plain", root, [at_training_step(3, signal.SIGTERM), None], **changes("sft"))
    alone = arena.run("sft", "plain", root, resume=Resume(), **changes("sft"))
    assert (alone.code, alone.error) == (2, "changed-since")
    assert "processes (world size): 2 then, 1 now" in alone.message
    accepted = arena.run("sft", "plain", root, resume=Resume(accept_changes=True), **changes("sft"))
    assert accepted.code == 0, accepted
    manifest = json.loads((root / "plain/sft-001/run.json").read_text())
    assert [change["what"] for change in manifest["resumed"][0]["changes"]] == ["processes (world size)"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_last_step_that_does_not_divide_is_trained_on_once(arena: Any, tmp_path: Path, stage: str) -> None:
    """Twelve rows in steps of eight: for the last four of an epoch, the second of two processes has none."""
    arena.reference("sft", "plain")
    # Dropout would draw other numbers in another process, and rounded gradients round otherwise in another batch.
    exact = {"scope": {"lora": {"r": 4, "lora_alpha": 8}}, "engine": {"precision": "exact"}}
    records = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        if stage == "dpo":
            shutil.copytree(arena.folder / "sft/plain", root / "plain")
        settings = {"changes": {stage: {"per_device_train_batch_size": 8 // processes}, **exact}}
        if processes == 1:
            all_ended = [arena.run(stage, "plain", root, **settings)]
        else:
            all_ended = arena.run_processes(stage, "plain", root, [None, None], **settings)
        assert {one.code for one in all_ended} == {0}, all_ended
        lines = (root / f"plain/{stage}-001/metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines if '"grad_norm"' in line])
    one, two = records
    assert len(one) == len(two) == 4  # two steps an epoch, of eight and of four
    for of_one, of_two in zip(one, two, strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4, abs=1e-4)
