"""Checkpoints on the disk: whole, listed and hashed, or not there.

A checkpoint is a folder `state/checkpoint-<step>` that was staged beside its place, brought to the disk and renamed.
Its manifest `checkpoint.json`, written last, lists every file with size and SHA-256 and carries a hash of itself; a
folder whose manifest is missing or does not hold is passed over, and the reason is said.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runs.files import fingerprint, fingerprints_in, remove_folder, staged_folder, write_json

CHECKPOINT_MANIFEST = "checkpoint.json"
COUNTERS = "counters.json"
"""What is neither weights nor optimizer: positions in data and metrics, TRL's counters, sums since the last log."""
KEEP_AT_LEAST = 2
"""The newest may turn out damaged."""
_FOLDER = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path
    step: int
    counters: dict[str, Any]


@dataclass(frozen=True)
class Search:
    """The newest whole checkpoint, if any, and why newer ones were passed over."""

    checkpoint: Checkpoint | None
    passed_over: list[tuple[str, str]]
    """Folder name and reason, the newest first."""


@contextmanager
def new_checkpoint(state: Path, step: int) -> Iterator[Path]:
    """A folder to write a checkpoint into; on leaving it is sealed and `state/checkpoint-<step>`.

    Raises:
        OSError: as the disk does; then there is no such checkpoint, and the older ones are as they were.
    """
    with staged_folder(state / f"checkpoint-{step}") as folder:
        yield folder
        body = {"step": step, "files": fingerprints_in(folder)}
        write_json(folder / CHECKPOINT_MANIFEST, {**body, "sha256": _sha256_of(body)})


def find_checkpoint(state: Path, metrics: Path) -> Search:
    """The newest checkpoint in `state` that is whole.

    Args:
        state: the run's folder of checkpoints; it need not exist.
        metrics: the run's `metrics.jsonl`, which must still begin as it did when the checkpoint was made.
    """
    passed_over: list[tuple[str, str]] = []
    for folder in reversed(checkpoint_folders(state)):
        problem = problem_of(folder)
        if problem is None:
            checkpoint = Checkpoint(folder, _step(folder), json.loads((folder / COUNTERS).read_text(encoding="utf-8")))
            problem = _metrics_problem(checkpoint.counters["metrics"], metrics)
            if problem is None:
                return Search(checkpoint, passed_over)
        passed_over.append((folder.name, problem))
    return Search(None, passed_over)


def problem_of(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint; None where it is one."""
    try:
        return _problem_of(folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{CHECKPOINT_MANIFEST} is damaged"


def _problem_of(folder: Path) -> str | None:
    try:
        body = json.loads((folder / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
        claimed = body.pop("sha256")
        if _sha256_of(body) != claimed:
            return f"{CHECKPOINT_MANIFEST} is damaged"
        files = body["files"]
    except FileNotFoundError:
        return f"it has no {CHECKPOINT_MANIFEST}, so it was never completed"
    except OSError as error:
        return f"{CHECKPOINT_MANIFEST} cannot be read ({error.strerror})"
    for name, listed in files.items():
        try:
            found = fingerprint(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["size"] != listed["size"]:
            return f"{name} has {found['size']:,} bytes and not {listed['size']:,}"
        if found["sha256"] != listed["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the listed one"
    if body["step"] != _step(folder) or COUNTERS not in files:
        return f"{CHECKPOINT_MANIFEST} is another checkpoint's"
    return None


def checkpoint_folders(state: Path) -> list[Path]:
    """Folders named like checkpoints, whole or not, by their step; links are none."""
    if not state.is_dir():
        return []
    found = [path for path in state.iterdir() if _FOLDER.match(path.name) and not path.is_symlink()]
    return sorted(found, key=_step)


def rotate(state: Path, keep: int) -> None:
    """Takes the oldest checkpoints away, all but `keep`."""
    for folder in checkpoint_folders(state)[:-keep]:
        remove_folder(folder)


def drop_newer(state: Path, step: int) -> None:
    """Takes away the folders behind `step`: they were found damaged, and the run will pass there again."""
    for folder in checkpoint_folders(state):
        if _step(folder) > step:
            remove_folder(folder)


def _step(folder: Path) -> int:
    match = _FOLDER.match(folder.name)
    assert match is not None
    return int(match[1])


def _metrics_problem(position: dict[str, Any], metrics: Path) -> str | None:
    """The lines that were logged before the checkpoint must still be there: the resumed run adds to them."""
    try:
        with metrics.open("rb") as stream:
            begin = stream.read(position["bytes"])
    except FileNotFoundError:
        begin = b""
    if len(begin) < position["bytes"]:
        return f"{metrics.name} is shorter than it was then"
    if hashlib.sha256(begin).hexdigest() != position["sha256"]:
        return f"{metrics.name} no longer begins as it did then"
    return None


def _sha256_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
