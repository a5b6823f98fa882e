"""Data files as rows: JSON Lines, read line by line, one JSON array, read whole, or tables; packed or not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from pipeline.data.archives import GZIP, ZSTD, ArchiveTooLargeError, BrokenArchiveError, Unpacked
from pipeline.data.codes import MENDS, NO_FILE
from pipeline.data.hub import DatasetError, dataset_rows, is_cached, is_hub
from pipeline.data.place import MAX_FINDINGS_PER_ROW, Finding, line_and_column, printable
from pipeline.data.source_row import MAX_ROW_BYTES, SourceRow, too_long
from pipeline.data.strict_json import JsonError, StrictJson, oddities, skip_space
from pipeline.data.tables import TableError, arrow_rows, csv_rows
from pipeline.errors import ExitCode, PipelineError

_HEAD_BYTES = 2**16
_BOM = "\ufeff"
_UNDECODED = re.compile("[\udc80-\udcff]")
_BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"FEA1": "a file of Feather's first version",
}
_TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""What Parquet, Arrow files and Arrow streams begin with."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff", b"{\x00", b"[\x00", b"\x00{", b"\x00[")


class Source:
    """One data file.

    Args:
        path: a regular file; whether it is one is found out by `rows`.
        start, end: of a JSONL file, the bytes to read, from the beginning of one line to that of another; None: to the
            end of the file. Lines are counted from `start`. The hash is that of a whole file only.
    """

    def __init__(self, path: Path, start: int = 0, end: int | None = None) -> None:
        self.path = path
        self.lines = 0
        """How many lines were read; of JSONL only."""
        self._start, self._end = start, end
        self.sha256 = ""
        """Of all bytes of the file, in hexadecimal; empty until `rows` has reached the end. Of a data set, which has
        no file, of its rows as JSON."""
        self._hash = hashlib.sha256()
        self._json = StrictJson()

    def rows(self) -> Iterator[SourceRow]:
        """All rows, the broken ones included. JSONL is never held in memory for more than a line.

        Raises:
            PipelineError: there is no such file, or no rows can be told apart in (the rest of) it.
        """
        if is_hub(self.path):
            yield from self._dataset()
            self.sha256 = self._hash.hexdigest()
            return
        self._check_path()
        try:
            with self.path.open("rb") as file:
                before = state(os.fstat(file.fileno()))
                if self._start:
                    file.seek(self._start)
                    yield from self._lines(file)
                else:
                    yield from self._file(file)
                if self._end is None and state(self.path.stat()) != before:
                    raise self.changed()
        except OSError as error:
            raise self._error("unreadable-file", f"cannot be read: {_reason(error)}") from error
        self.sha256 = self._hash.hexdigest()

    def is_jsonl(self) -> bool:
        """Whether the file is plain JSONL, which can be read in pieces.

        Raises:
            OSError: it cannot be read.
            PipelineError: there is no such file, or no rows can be told apart in it.
        """
        self._check_path()
        with self.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if self._delimiter() or head.startswith((GZIP, ZSTD, *_TABLES)):
            return False
        self._check_head(head)
        return not _is_array(head)

    def changed(self) -> PipelineError:
        """The error that the file is not any more what it was when reading began."""
        return self._error("file-changed", "the file changed while it was read")

    def _file(self, file: BinaryIO) -> Iterator[SourceRow]:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        magic = next((magic for magic in (GZIP, ZSTD) if head.startswith(magic)), None)
        try:
            if magic is None:
                if self._delimiter() or head.startswith(_TABLES):
                    while piece := file.read(2**20):
                        self._hash.update(piece)
                    file.seek(0)
                yield from self._content(file, head)
            else:
                unpacked = Unpacked(file, magic)
                stream = io.BufferedReader(unpacked, _HEAD_BYTES)
                yield from self._content(stream, stream.peek(_HEAD_BYTES))
                self._hash = unpacked.hash
        except BrokenArchiveError as error:
            raise self._error("broken-archive", str(error)) from error
        except ArchiveTooLargeError as error:
            raise self._error("archive-too-large", str(error)) from error
        except TableError as error:
            raise self._error("invalid-table", str(error), error.line) from error

    def _content(self, file: BinaryIO, head: bytes) -> Iterator[SourceRow]:
        """The rows of what is, or was, not packed."""
        if table := next((magic for magic in _TABLES if head.startswith(magic)), None):
            if file.seekable():
                yield from self._some(arrow_rows(file, table))
            else:
                with tempfile.TemporaryFile() as copy:
                    shutil.copyfileobj(file, copy)
                    copy.seek(0)
                    yield from self._some(arrow_rows(copy, table))
            return
        self._check_head(head)
        if delimiter := self._delimiter():
            yield from self._some(csv_rows(file, delimiter))
        else:
            yield from self._array(file) if _is_array(head) else self._lines(file)

    def _some(self, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
        count = 0
        for count, row in enumerate(rows, 1):  # noqa: B007 - what is left of it says how many
            yield row
        if not count:
            raise self._error("empty-file", "the table has no rows")

    def _delimiter(self) -> str | None:
        """Of a CSV file, which has nothing but its name to be known by."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        while suffixes and suffixes[-1] in (".gz", ".zst"):
            suffixes.pop()
        return _DELIMITERS.get(suffixes[-1]) if suffixes else None

    def _dataset(self) -> Iterator[SourceRow]:
        try:
            for row in self._some(dataset_rows(self.path)):
                self._hash.update(json.dumps(row.value, sort_keys=True).encode() + b"\n")
                yield row
        except DatasetError as error:
            raise self._error("unreadable-dataset", str(error)) from error

    def _error(self, code: str, message: str, line: int | None = None, mend: str | None = None) -> PipelineError:
        exit_code = ExitCode.USAGE if code in NO_FILE else ExitCode.WRONG
        mend = mend or MENDS[code]
        return PipelineError(message, code=code, mend=mend, file=self.path, line=line, exit_code=exit_code)

    def _check_path(self) -> None:
        try:
            mode = self.path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise self._error("no-such-file", "no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise self._error("unreadable-file", f"cannot be read: {_reason(error)}") from None
        if stat.S_ISDIR(mode):
            raise self._error("is-a-folder", "a folder, not a file")
        if self.path.is_symlink() and not is_cached(self.path):
            mend = f"name the file itself: {printable(str(self.path.resolve()))}"
            raise self._error("symbolic-link", "a symbolic link, which may lead elsewhere tomorrow", mend=mend)
        if not stat.S_ISREG(mode):
            raise self._error("special-file", "a pipe, socket or device, not an ordinary file")

    def _check_head(self, head: bytes) -> None:
        if not head:
            raise self._error("empty-file", "the file is empty")
        for magic, name in _BINARY.items():
            if head.startswith(magic):
                raise self._error("unsupported-file", f"{name}, neither JSONL nor JSON")
        if head.startswith(_UTF_16_OR_32):
            raise self._error("wrong-encoding", "the file is in UTF-16 or UTF-32, not in UTF-8")

    def _lines(self, file: BinaryIO) -> Iterator[SourceRow]:
        number = rows = 0
        whole = self._end is None  # a piece's bytes are hashed by who divides the file
        while (whole or file.tell() < (self._end or 0)) and (line := file.readline(MAX_ROW_BYTES + 1)):
            number += 1
            if whole:
                self._hash.update(line)
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                    self._hash.update(rest)
                self._hash.update(rest)
                yield SourceRow(number, None, "", 0, findings=[too_long()])
            elif line[0] > 0x20 or line.strip(b" \t\r\n"):
                row = self._line(*_decode(line), number)
                if not rows and not self._start and _spans_lines(row, self.path):
                    raise self._error("not-rows", "one JSON object over several lines, not one a line", number)
                yield row
            else:
                continue
            rows += 1
        self.lines = number
        if not rows and not self._start and self._end is None:
            raise self._error("empty-file", "the file has no rows")

    def _line(self, text: str, broken: bool, number: int) -> SourceRow:
        text = text.rstrip("\r\n")
        row = SourceRow(number, None, text, skip_space(text, 0))
        if text.startswith(_BOM):
            row.findings.append(_byte_order_mark())
            row.start = skip_space(text, 1)
        if broken:
            row.findings += _broken_utf_8(text, 0, len(text))
            return row
        end = self._parse(row)
        if end is not None and (end := skip_space(text, end)) < len(text):
            row.readable = False
            row.findings = [Finding("invalid-json", "not valid JSON: more text after the row", None, end)]
        return row

    def _array(self, file: BinaryIO) -> Iterator[SourceRow]:
        data = file.read()
        self._hash.update(data)
        text, broken = _decode(data)
        del data
        position = 0
        early = []
        if text.startswith(_BOM):
            early.append(_byte_order_mark())
            position = 1
        position = last = skip_space(text, position) + 1
        index, line = 0, 1 + text.count("\n", 0, position)
        while True:
            position = skip_space(text, position)
            line += text.count("\n", last, position)
            last = position
            if index == 0 and text[position : position + 1] == "]":
                raise self._error("empty-file", "the array has no rows")
            row = SourceRow(line, index, text, position, findings=early)
            early = []
            end = self._parse(row)
            reached = (row.findings[-1].offset or 0) + 1 if end is None else end
            if broken and (bad := _broken_utf_8(text, position, reached)):
                row.findings, row.readable = bad, False
            elif end is not None and end - position > MAX_ROW_BYTES:
                row.findings, row.readable = [too_long()], False
            yield row
            if end is None:
                return  # where the next row begins cannot be told
            position = skip_space(text, end)
            index += 1
            if text[position : position + 1] != ",":
                break
            position += 1
        if text[position : position + 1] != "]":
            self._refuse_rest(text, position, "expecting ',' or ']' after the row")
        position = skip_space(text, position + 1)
        if position < len(text):
            self._refuse_rest(text, position, "more text after the array")

    def _refuse_rest(self, text: str, position: int, cause: str) -> None:
        line, column = line_and_column(text, position, 0, 1)
        message = f"not valid JSON: {cause} (column {column})"
        raise self._error("invalid-json", message, line)

    def _parse(self, row: SourceRow) -> int | None:
        """Reads the row's value; returns where it ends, None where that cannot be told."""
        try:
            parsed = self._json.parse(row.text, row.start)
        except JsonError as error:
            row.findings.append(error.finding)
            return None
        row.value, row.readable = parsed.value, True
        if parsed.odd:
            row.findings.extend(islice(oddities(row.text, row.start), MAX_FINDINGS_PER_ROW))
        return parsed.end


def _is_array(head: bytes) -> bool:
    """An array can only mean rows; a row of JSONL is an object, whatever the file is called."""
    return head.removeprefix(_BOM.encode()).lstrip(b" \t\r\n").startswith(b"[")


def state(file: os.stat_result) -> tuple[int, ...]:
    """What differs when somebody writes to the file, or puts another in its place."""
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def _decode(data: bytes) -> tuple[str, bool]:
    """The text, and whether it is broken: bytes that are not UTF-8 become what `_UNDECODED` finds."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape"), True


def _spans_lines(row: SourceRow, path: Path) -> bool:
    """Whether the first line of a file is the beginning of an object that goes on in the next line."""
    if row.readable:
        return False
    cut = path.suffix == ".json" and row.findings[-1].offset == len(row.text)
    return cut or row.text.strip() == "{"


def _byte_order_mark() -> Finding:
    return Finding("byte-order-mark", "a byte order mark stands before the row", None, 0)


def _broken_utf_8(text: str, start: int, end: int) -> list[Finding]:
    """The first place between `start` and `end` that was not UTF-8, if there is one."""
    bad = _UNDECODED.search(text, start, end)
    return [Finding("broken-utf-8", "the bytes here are not UTF-8", None, bad.start())] if bad else []


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
