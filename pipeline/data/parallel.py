"""Checks one large JSONL file on several cores: pieces between ends of lines, put together in their order.

The report is the one that `check_file` gives, to the last character.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from pipeline.data.check import Beginning, Piece, beginning, check_file, check_piece
from pipeline.data.read import Source, state
from pipeline.data.result import Report
from pipeline.data.suspect import finish
from pipeline.errors import PipelineError

_PIECE_BYTES = 16 * 2**20
_LARGE_BYTES = 64 * 2**20
"""Below this, one core is done before others have started."""
_SMALL_BYTES = 4 * 2**20
_BLOCK_BYTES = 2**20


def check_large_file(
    path: Path,
    kind: str | None = None,
    *,
    max_errors: int = 100,
    near: bool | None = None,
    columns: Mapping[str, str] | None = None,
    workers: int | None = None,
    piece_bytes: int = _PIECE_BYTES,
) -> Report:
    """What `check_file` gives, sooner where the file is JSONL and large.

    Args:
        path: the data file.
        kind: `demonstration` or `preference`; None: that of the first row that has one.
        max_errors: how many errors, and how many warnings, the report keeps; all are counted.
        near: whether to look for near duplicates, on one core; None: in a file of up to 4 MiB.
        columns: names of columns and the fields that they stand for, which one core does.
        workers: processes; None: as many as there are cores for a file of 64 MiB or more, one for a smaller one.
        piece_bytes: what a process reads at a time.
    """
    try:
        before = path.stat()
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if before.st_size >= _LARGE_BYTES else 1
        if near is None:
            near = before.st_size <= _SMALL_BYTES
        if workers > 1 and not near and not columns and Source(path).is_jsonl():
            pieces = list(_pieces(path, before.st_size, piece_bytes))
            decided = beginning(path, kind, pieces[0][1])
            if decided.format is not None:
                report = _check(path, kind, decided, max_errors, workers, pieces)
                if state(path.stat()) != state(before):
                    report.sha256 = ""
                    report.add_file_error(Source(path).changed(), max_errors)
                finish(report, max_errors)
                return report
    except (OSError, ValueError, PipelineError, BrokenProcessPool):
        pass  # `check_file` says what is wrong, or manages in one process
    return check_file(path, kind, max_errors=max_errors, near=bool(near), columns=columns)


def _check(
    path: Path, kind: str | None, decided: Beginning, max_errors: int, workers: int, pieces: list[tuple[int, int]]
) -> Report:
    """Arguments are those of `check_large_file`, and what the first piece will find out by itself."""
    context = multiprocessing.get_context("spawn")  # a copy of a process that has threads may hang
    with ProcessPoolExecutor(workers, context, _let_parent_handle_interrupts) as pool:
        asked: list[Future[Piece]] = []
        for start, end in pieces:
            first = decided if start else Beginning(kind)
            asked.append(pool.submit(check_piece, path, first, max_errors, start, end))
        try:
            sha256 = _hash(path)
            return _together(asked, sha256, max_errors)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _let_parent_handle_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _together(asked: list[Future[Piece]], sha256: str, max_errors: int) -> Report:
    """One report from those of the pieces; each is dropped once it is counted."""
    asked.reverse()
    report, lines, complete = asked.pop().result()
    while asked and complete:
        piece, more, complete = asked.pop().result()
        room = max_errors - len(report.errors)
        report.errors += [replace(error, line=error.line and error.line + lines) for error in piece.errors[:room]]
        report.rows += piece.rows
        report.valid += piece.valid
        report.separable &= piece.separable
        report.error_count += piece.error_count
        report.error_counts.update(piece.error_counts)
        report.counts.fold(piece.counts)
        report.prints.extend(piece.prints, lines)
        lines += more
    report.sha256 = sha256 if complete else ""
    return report


def _hash(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            hashed.update(block)
    return hashed.hexdigest()


def _pieces(path: Path, size: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Bytes from the beginning of one line to that of another, about so many at a time, up to the end of the file."""
    with path.open("rb") as file:
        start = 0
        while start < size:
            file.seek(start + piece_bytes - 1)
            while (part := file.readline(_BLOCK_BYTES)) and not part.endswith(b"\n"):
                pass
            end = min(file.tell(), size)
            if end <= start:
                end = size
            yield start, end
            start = end
