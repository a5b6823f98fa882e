from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.runs.checkpoints import (
    CHECKPOINT_MANIFEST,
    COUNTERS,
    checkpoint_folders,
    drop_newer,
    find_checkpoint,
    new_checkpoint,
    problem_of,
    rotate,
)

LOGGED = b'{"step": 1}\n'


def make(state: Path, step: int) -> Path:
    position = {"bytes": len(LOGGED), "sha256": hashlib.sha256(LOGGED).hexdigest()}
    with new_checkpoint(state, step) as folder:
        (folder / "weights.bin").write_bytes(bytes(range(200)))
        (folder / COUNTERS).write_text(json.dumps({"metrics": position}))
    return state / f"checkpoint-{step}"


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LOGGED + b'{"step": 2}\n')
    return path


def test_the_newest_whole_one_is_found_by_its_step(tmp_path: Path, metrics: Path) -> None:
    for step in (2, 10, 9):
        make(tmp_path / "state", step)
    search = find_checkpoint(tmp_path / "state", metrics)
    assert search.checkpoint is not None
    assert (search.checkpoint.step, search.passed_over) == (10, [])
    assert search.checkpoint.counters["metrics"]["bytes"] == len(LOGGED)


def test_no_state_is_no_checkpoint(tmp_path: Path, metrics: Path) -> None:
    assert find_checkpoint(tmp_path / "state", metrics).checkpoint is None


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    folder = make(tmp_path / "state", 3)
    assert problem_of(folder) is None
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            problem = problem_of(folder)
            # JSON may be written in other ways: a flip that says the same is none.
            if path.name == CHECKPOINT_MANIFEST and problem is None:
                assert json.loads(damaged) == json.loads(content)
                continue
            assert problem is not None, (path.name, bit)
            assert path.name in problem
        path.write_bytes(content)
    assert problem_of(folder) is None


@pytest.mark.parametrize("name", ["weights.bin", COUNTERS, CHECKPOINT_MANIFEST])
def test_a_missing_and_a_cut_file_are_named(tmp_path: Path, metrics: Path, name: str) -> None:
    make(tmp_path / "state", 1)
    for step, damage in ((2, "missing"), (3, "cut")):
        path = make(tmp_path / "state", step) / name
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9])
    search = find_checkpoint(tmp_path / "state", metrics)
    assert search.checkpoint is not None
    assert search.checkpoint.step == 1
    assert [folder for folder, _ in search.passed_over] == ["checkpoint-3", "checkpoint-2"]
    assert all(name in reason for _, reason in search.passed_over)


def test_a_folder_under_another_ones_name_is_passed_over(tmp_path: Path) -> None:
    folder = make(tmp_path / "state", 3)
    folder.rename(tmp_path / "state/checkpoint-30")
    assert "another checkpoint's" in str(problem_of(tmp_path / "state/checkpoint-30"))


def test_a_link_is_no_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "elsewhere", 3)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/checkpoint-3").symlink_to(folder)
    assert checkpoint_folders(tmp_path / "state") == []


@pytest.mark.parametrize("content", [b"", LOGGED[:-1], b'{"step": 9}\n'])
def test_a_record_that_is_another_one_is_not_added_to(tmp_path: Path, metrics: Path, content: bytes) -> None:
    make(tmp_path / "state", 3)
    metrics.write_bytes(content)
    search = find_checkpoint(tmp_path / "state", metrics)
    assert search.checkpoint is None
    assert "metrics.jsonl" in search.passed_over[0][1]


def test_a_failure_leaves_the_older_ones_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "state", 1)

    def fail() -> None:
        with new_checkpoint(tmp_path / "state", 2) as folder:
            (folder / "weights.bin").write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["checkpoint-1"]


def test_rotation_keeps_the_newest_and_dropping_takes_what_lies_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for step in (1, 2, 10, 11):
        make(state, step)
    rotate(state, 3)
    assert [path.name for path in checkpoint_folders(state)] == ["checkpoint-2", "checkpoint-10", "checkpoint-11"]
    drop_newer(state, 2)
    assert sorted(path.name for path in state.iterdir()) == ["checkpoint-2"]
