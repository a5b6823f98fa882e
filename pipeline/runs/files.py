"""Writing files so that what exists is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The two files of a PEFT adapter."""


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` by staging, fsync and rename: a reader sees the old file or the new one, whole."""
    descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files for the owner only; a result is as readable as its folder allows.
        Path(staged).chmod(0o644)
        Path(staged).replace(path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as strict, indented JSON, atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """`size` in bytes and `sha256` of a file."""
    with path.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def fingerprints_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The fingerprint of every file in `folder` and below, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; on leaving, it is `target` with every byte on the disk, or nothing of it is there.

    A `target` that exists is replaced. What a killed process leaves is a hidden folder that `sweep` takes away.

    Raises:
        OSError: as the disk does.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staged
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        staged.chmod(0o755)  # mkdtemp makes folders for the owner only
        if target.exists():
            remove_folder(target)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Takes a folder away so that it is there whole or not at all: first out of sight, then file by file."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(hidden)  # onto an empty folder, which POSIX allows
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Takes away what staging and removing left in `folder` when their process died."""
    for path in folder.glob(".*-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
