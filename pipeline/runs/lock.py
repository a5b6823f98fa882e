"""One run folder, one writer: a lock that the kernel takes away when its process dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.errors import PipelineError

LOCK = "run.lock"
_TRIES = 5
_PAUSE = 0.05
"""Seconds; `is_locked` holds the lock for a moment while it looks."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder. Its file stays, and says which process held it last.

    Raises:
        PipelineError: another process that is alive holds it.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as stream:
        _take(stream, fcntl.LOCK_EX, folder)
        stream.truncate(0)
        stream.write(f"process {os.getpid()}\n")
        stream.flush()
        yield


@contextmanager
def unwritten(folder: Path) -> Iterator[None]:
    """While open, nobody takes the lock of a run folder; several readers stand beside each other.

    Raises:
        PipelineError: a process that is alive writes to the run.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as stream:
        _take(stream, fcntl.LOCK_SH, folder)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a living process writes to the run in `folder`."""
    try:
        with (folder / LOCK).open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _take(stream: TextIO, kind: int, folder: Path) -> None:
    for _ in range(_TRIES):
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        else:
            return
    stream.seek(0)
    raise PipelineError(
        f"another process writes to this run ({stream.read().strip() or 'process unknown'})",
        code="run-locked",
        file=folder,
        mend="wait until it ends, or end it",
    )
