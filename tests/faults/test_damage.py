"""What a disk can do to a run that was killed or is running, and what is made of it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.runs.checkpoints import _sha256_of
from pipeline.runs.files import fingerprint, write_json
from pipeline.runs.lock import locked
from pipeline.runs.resume import Resume


def kill_at_step(step: int) -> Callable[[], None]:
    def hook() -> None:
        from pipeline.training.keeper import Resumable

        training_step = Resumable.training_step

        def deadly(trainer: Any, *given: Any, **more: Any) -> Any:
            if trainer.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return training_step(trainer, *given, **more)

        Resumable.training_step = deadly

    return hook


@pytest.fixture(scope="session")
def killed(arena: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Copies of an SFT run that was killed in its fifth step and left the checkpoints 2 and 4."""
    original = tmp_path_factory.mktemp("killed")
    assert arena.run("sft", "plain", original, hook=kill_at_step(4)).code == -9

    def copied(root: Path) -> Path:
        shutil.copytree(original, root)
        return root / "plain/sft-001"

    return copied


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "adapter_model.safetensors"),
        (flip, "generators.pt"),
        (cut, "optimizer.pt"),
        (Path.unlink, "optimizer.pt"),
        (Path.unlink, "checkpoint.json"),
    ],
    ids=lambda given: getattr(given, "__name__", given),
)
def test_a_damaged_checkpoint_is_passed_over_and_said(
    arena: Any, killed: Any, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(killed(tmp_path / "runs") / "state/checkpoint-4" / name)
    ended = arena.resume("sft", "plain", tmp_path / "runs")
    assert "checkpoint-4 is passed over" in ended.said
    assert name in ended.said
    assert "at step 2" in ended.said
    survived = arena.outcome("sft", "plain", tmp_path / "runs") == arena.reference("sft", "plain")
    arena.judge("damaged checkpoint", f"{damage.__name__} {name}: {ended}", survived)


def test_no_whole_checkpoint_is_never_a_silent_new_start(arena: Any, killed: Any, tmp_path: Path) -> None:
    run = killed(tmp_path / "runs")
    for folder in (run / "state").iterdir():
        flip(folder / "optimizer.pt")
    ended = arena.run("sft", "plain", tmp_path / "runs", resume=Resume())
    assert (ended.code, ended.error) == (2, "no-checkpoint")
    assert "checkpoint-4: optimizer.pt is damaged" in ended.message
    assert "checkpoint-2: optimizer.pt is damaged" in ended.message
    assert sorted(path.name for path in run.parent.iterdir()) == ["sft-001"]


def test_a_torn_line_and_a_clock_set_back(arena: Any, killed: Any, tmp_path: Path) -> None:
    """The record has half a line, as a kill leaves it; the clock says that yesterday is now."""
    run = killed(tmp_path / "runs")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')

    def hook() -> None:
        now = time.time
        time.time = lambda: now() - 86_400

    ended = arena.resume("sft", "plain", tmp_path / "runs", hook=hook)
    survived = arena.outcome("sft", "plain", tmp_path / "runs") == arena.reference("sft", "plain")
    arena.judge("torn line, clock set back", str(ended), survived)


def test_a_second_writer_is_refused_and_the_first_goes_on(arena: Any, killed: Any, tmp_path: Path) -> None:
    run = killed(tmp_path / "runs")
    before = (run / "run.json").read_bytes()
    with locked(run):
        ended = arena.resume("sft", "plain", tmp_path / "runs")
        assert ended.error == "run-locked"
        assert str(os.getpid()) in ended.message
        assert (run / "run.json").read_bytes() == before
    ended = arena.resume("sft", "plain", tmp_path / "runs")
    survived = arena.outcome("sft", "plain", tmp_path / "runs") == arena.reference("sft", "plain")
    arena.judge("two writers", str(ended), survived)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=lambda number: errno.errorcode[number])
def test_a_disk_that_fails_while_saving_does_not_end_the_run(arena: Any, tmp_path: Path, number: int) -> None:
    """Each checkpoint meets the fault once, the first at its first file, the next ones later and later."""

    def hook() -> None:
        import torch

        from pipeline.training.keeper import Keeper

        save, write, fsync = Keeper.save, torch.save, os.fsync
        saves = 0

        def full(*given: Any, **more: Any) -> Any:
            raise OSError(number, os.strerror(number), "somewhere")

        def faulty(keeper: Any) -> None:
            nonlocal saves
            saves += keeper._trainer.state.global_step != keeper.saved
            torch.save = full if saves == 1 else write
            os.fsync = full if saves == 2 else fsync
            try:
                save(keeper)
            finally:
                torch.save, os.fsync = write, fsync

        Keeper.save = faulty

    ended = arena.run("sft", "plain", tmp_path, hook=hook)
    assert ended.said.count("could not be written") == 2
    assert os.strerror(number) in ended.said
    assert sorted(path.name for path in (tmp_path / "plain/sft-001/state").iterdir()) == ["checkpoint-6"]
    survived = arena.outcome("sft", "plain", tmp_path) == arena.reference("sft", "plain")
    arena.judge("disk fails while saving", f"{errno.errorcode[number]}: {ended}", survived)


@pytest.mark.parametrize("limit", [11_000])
def test_files_that_may_not_grow_leave_the_last_good_checkpoint(
    arena: Any, killed: Any, tmp_path: Path, limit: int
) -> None:
    """The kernel itself refuses (RLIMIT_FSIZE), to safetensors and torch as well, which write by themselves."""
    run = killed(tmp_path / "runs")

    def hook() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = arena.resume("sft", "plain", tmp_path / "runs", hook=hook)
    assert (ended.code, ended.error) == (4, "disk"), ended
    assert "the last good one is of step 4" in ended.said
    assert not (run / "adapter").exists()
    assert sorted(path.name for path in (run / "state").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    again = arena.resume("sft", "plain", tmp_path / "runs")
    survived = arena.outcome("sft", "plain", tmp_path / "runs") == arena.reference("sft", "plain")
    arena.judge("files that may not grow", f"{limit}: {again}", survived)


@pytest.mark.parametrize("name", ["generators.pt", "optimizer.pt", "scheduler.pt"])
def test_code_in_a_checkpoint_is_not_run(arena: Any, killed: Any, tmp_path: Path, name: str) -> None:
    """Put there by somebody who has sealed the checkpoint anew, so that all hashes hold."""
    folder = killed(tmp_path / "runs") / "state/checkpoint-4"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was-run",)

    torch.save({"now": Code(), "state": Code()}, folder / name)
    body = {"step": 4, "files": {one.name: fingerprint(one) for one in folder.iterdir() if one.suffix != ".md"}}
    del body["files"]["checkpoint.json"]
    write_json(folder / "checkpoint.json", {**body, "sha256": _sha256_of(body)})
    ended = arena.run("sft", "plain", tmp_path / "runs", resume=Resume())
    assert (ended.code, ended.error) == (2, "foreign-state"), ended
    assert not (tmp_path / "was-run").exists()
    arena.judge("code in a checkpoint", name, True)
