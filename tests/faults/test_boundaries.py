"""Kills before every call that changes what is on the disk, while a checkpoint or a manifest is written."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.checkpoints import COUNTERS, checkpoint_folders, find_checkpoint, new_checkpoint, rotate
from pipeline.runs.files import sweep, write_json
from pipeline.runs.run import MANIFEST, read_run

CALLS = ("open", "fsync", "rename", "replace", "mkdir", "chmod", "unlink", "rmdir")
NOTHING_LOGGED = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}


class Boundaries:
    """Watches the calls of Python to the system, and dies before one of them.

    Args:
        deadly: its number, from 0; None: none is.
    """

    def __init__(self, deadly: int | None) -> None:
        self.seen: list[str] = []
        self.active = False
        self._deadly = deadly

    def watch(self) -> None:
        """From now on; never taken back: it is for a child that ends soon."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        io.open = self._watched("write", io.open)  # what pathlib opens files with

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            if self.active:
                if len(self.seen) == self._deadly:
                    os._exit(9)
                self.seen.append(name)
            return call(*given, **more)

        return counted


def write(state: Path, step: int) -> None:
    with new_checkpoint(state, step) as folder:
        (folder / "weights.bin").write_bytes(bytes(1000))
        (folder / COUNTERS).write_text(json.dumps({"metrics": NOTHING_LOGGED}))


def in_child(work: Callable[[Boundaries], None], deadly: int | None, log: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            boundaries = Boundaries(deadly)
            boundaries.watch()
            work(boundaries)
            boundaries.active = False
            log.write_text(" ".join(boundaries.seen))
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_checkpoint_is_there_whole_or_not_at_every_boundary(arena: Any, tmp_path: Path) -> None:
    def work(state: Path) -> Callable[[Boundaries], None]:
        def third(boundaries: Boundaries) -> None:
            boundaries.active = True
            write(state, 3)
            rotate(state, 2)

        return third

    def begin(name: str) -> Path:
        for step in (1, 2):
            write(tmp_path / name, step)
        return tmp_path / name

    log = tmp_path / "log"
    assert in_child(work(begin("whole")), None, log) == 0
    calls = log.read_text().split()
    assert calls.count("rename") == 2  # the checkpoint into its place, the oldest out of sight
    for at in range(len(calls)):
        state = begin(str(at))
        assert in_child(work(state), at, log) == 9
        search = find_checkpoint(state, tmp_path / "no-metrics")
        # In its place from the first rename on, and no older one goes before.
        expected = 3 if at > calls.index("rename") else 2
        survived = search.checkpoint is not None and search.checkpoint.step == expected and not search.passed_over
        arena.judge("kill at a boundary of a checkpoint", f"before call {at} ({calls[at]}): {search}", survived)
        sweep(state)
        write(state, 4)
        rotate(state, 2)
        assert len(checkpoint_folders(state)) == 2
        assert not [path for path in state.iterdir() if path.name.startswith(".")]


def test_a_manifest_is_the_old_or_the_new_one_at_every_boundary(arena: Any, tmp_path: Path) -> None:
    old, new = ({"stage": "sft", "status": status, "more": "x" * 5000} for status in ("running", "finished"))

    def work(folder: Path) -> Callable[[Boundaries], None]:
        def again(boundaries: Boundaries) -> None:
            boundaries.active = True
            write_json(folder / MANIFEST, new)

        return again

    log = tmp_path / "log"
    calls = ["", ""]
    at = 0
    while at < len(calls):
        folder = tmp_path / str(at)
        folder.mkdir()
        write_json(folder / MANIFEST, old)
        if at == 0:
            assert in_child(work(folder), None, log) == 0
            calls = log.read_text().split()
            write_json(folder / MANIFEST, old)
        assert in_child(work(folder), at, log) == 9
        manifest = read_run(folder).manifest
        expected = new if at > calls.index("replace" if "replace" in calls else "rename") else old
        arena.judge("kill at a boundary of a manifest", f"before call {at} ({calls[at]})", manifest == expected)
        at += 1


def test_bytes_are_on_the_disk_before_they_get_their_name(tmp_path: Path) -> None:
    """Against a machine that loses its power: no rename before every file and the folder of the new one are synced."""
    log = tmp_path / "log"

    def work(boundaries: Boundaries) -> None:
        boundaries.active = True
        write(tmp_path / "state", 1)

    assert in_child(work, None, log) == 0
    calls = log.read_text().split()
    into_place = calls.index("rename")
    # Three files and the folder (the manifest is synced on its own before as well), then the folder that has the name.
    assert calls[:into_place].count("fsync") >= 4 + 2
    assert calls[into_place:].count("fsync") == 1


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_runs_killed_at_boundaries_are_resumed(arena: Any, tmp_path: Path, stage: str) -> None:
    """In a whole run: from the first checkpoint to the last word of the manifest."""

    def watched(deadly: int | None, log: Path | None = None) -> Callable[[], None]:
        def hook() -> None:
            from pipeline.runs.run import Run
            from pipeline.training.keeper import Keeper

            boundaries = Boundaries(deadly)
            boundaries.watch()
            save, end = Keeper.save, Run.end

            def save_watched(keeper: Any) -> None:
                boundaries.active = True
                save(keeper)
                boundaries.active = keeper._trainer.state.global_step == keeper._trainer.state.max_steps

            def end_watched(run: Any, *given: Any, **more: Any) -> None:
                end(run, *given, **more)
                boundaries.active = False
                if log is not None:
                    log.write_text(" ".join(boundaries.seen))

            Keeper.save, Run.end = save_watched, end_watched

        return hook

    expected = arena.reference(stage, "plain")
    log = tmp_path / "log"
    root = arena.start(stage, "plain", tmp_path / "whole")
    assert arena.run(stage, "plain", root, hook=watched(None, log)).code == 0
    calls = log.read_text().split()
    choose = random.Random(stage)
    for at in choose.sample(range(len(calls)), min(max(arena.kills // 8, 2), len(calls))):
        root = arena.start(stage, "plain", tmp_path / str(at))
        assert arena.run(stage, "plain", root, hook=watched(at)).code == 9
        ended = arena.resume(stage, "plain", root)
        survived = arena.outcome(stage, "plain", root) == expected
        arena.judge("kill at a boundary of a run", f"{stage} before call {at} ({calls[at]}): {ended}", survived)
