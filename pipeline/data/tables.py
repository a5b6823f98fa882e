"""Tables as rows: CSV by its lines; Parquet and Arrow, which have none, by the number of the row.

A table's cells are made to what JSON can say: NaN and infinite numbers become null, dates and decimals text, binary
null. In CSV a cell is text, but `messages`, `conversations`, `history` and `tools` hold JSON; empty ones are null.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, BinaryIO

from pipeline.data.place import Finding, Keys
from pipeline.data.source_row import MAX_ROW_BYTES, SourceRow, too_long

_JSON_COLUMNS = ("messages", "conversations", "history", "tools")
_UNDECODED = re.compile("[\udc80-\udcff]")
_BATCH = 64
"""Rows of Parquet and Arrow that are in memory at a time (of Arrow, those of one record batch)."""
_MIN_INT, _MAX_INT = -(2**63), 2**64


class TableError(ValueError):
    """The rest of a table cannot be told apart into rows.

    Args:
        message: why.
        line: where, from 1; None: the table has no lines.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def csv_rows(file: BinaryIO, delimiter: str) -> Iterator[SourceRow]:
    """The records of a CSV file below its header, each with the line on which it begins. A BOM, as spreadsheets write
    it, is no error here.

    Raises:
        TableError: there is no header, or a quote is not closed.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = lines.number + 1
        lines.begin()
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise TableError(f"not valid CSV: {_lower(error)}", line) from None
        if record is None:
            return
        if not record:  # a blank line
            continue
        if header is None:
            header = _header(record, line)
            continue
        yield _record(header, record, line, lines.length)


class _Lines:
    """The decoded lines of a file; bytes that are not UTF-8 become what `_UNDECODED` finds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.length = 0
        """Bytes since `begin`."""

    def begin(self) -> None:
        self.length = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.length += len(line)
        if self.length > 2 * MAX_ROW_BYTES:
            raise csv.Error("a record that does not end: is a quote not closed?")
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        return line.decode("utf-8", "surrogateescape")


def _header(record: list[str], line: int) -> list[str]:
    twice = {name for name in record if record.count(name) > 1}
    if twice:
        raise TableError(f"two columns are called `{min(twice)[:60]}`", line)
    return record


def _record(header: list[str], record: list[str], line: int, length: int) -> SourceRow:
    row = SourceRow(line, None, "", 0)
    if length > MAX_ROW_BYTES:
        row.findings.append(too_long())
        return row
    if len(record) != len(header):
        message = f"{len(record)} cells, and the header has {len(header)}"
        row.findings.append(Finding("invalid-table", message))
        return row
    value: dict[str, Any] = {}
    for name, cell in zip(header, record, strict=True):
        if _UNDECODED.search(cell):
            row.findings.append(Finding("broken-utf-8", "the bytes here are not UTF-8", (name,)))
        elif "\0" in cell:
            row.findings.append(_nul((name,)))
        value[name] = _cell(name, cell, row.findings)
    row.value, row.readable = value, not row.findings
    return row


def _cell(name: str, cell: str, findings: list[Finding]) -> Any:
    if name not in _JSON_COLUMNS or name == "tools":
        return cell or None if name == "tools" else cell
    if not cell.strip():
        return None
    try:
        return json.loads(cell, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        findings.append(Finding("invalid-json", f"`{name}` is not valid JSON", (name,)))
        return None


def arrow_rows(file: Any, magic: bytes) -> Iterator[SourceRow]:
    """The rows of a Parquet or Arrow file (IPC file or stream, which Feather is as well).

    Raises:
        TableError: the file is damaged.
    """
    import pyarrow

    try:
        numbers = count()
        for batch in _batches(file, magic):
            for start in range(0, batch.num_rows, _BATCH):
                yield from table_rows(batch.slice(start, _BATCH), numbers)
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"cannot be read: {_lower(error)}") from None


def _batches(file: Any, magic: bytes) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if magic == b"PAR1":
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH)
        return
    opened = pyarrow.ipc.open_file(file) if magic == b"ARROW1" else pyarrow.ipc.open_stream(file)
    batches: Iterable[Any] = (
        (opened.get_batch(index) for index in range(opened.num_record_batches)) if magic == b"ARROW1" else opened
    )
    for batch in batches:
        batch.validate(full=True)  # damaged offsets would be followed otherwise
        yield batch


def table_rows(batch: Any, numbers: Iterator[int]) -> Iterator[SourceRow]:
    """The rows of a pyarrow table or record batch, numbered by `numbers`."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        values = [None] * batch.num_rows
    for at, value in enumerate(values):
        row = SourceRow(None, next(numbers), "", 0)
        try:
            value = batch.slice(at, 1).to_pylist()[0] if value is None else value
        except UnicodeDecodeError:
            row.findings.append(Finding("broken-utf-8", "a text in the row is not UTF-8"))
        else:
            row.value = _plain(value, (), row.findings)
            row.readable = not row.findings
        yield row


def _plain(value: Any, keys: Keys, findings: list[Finding]) -> Any:
    """What JSON can say of a cell."""
    if isinstance(value, str):
        if "\0" in value:
            findings.append(_nul(keys))
        if len(value) > MAX_ROW_BYTES:
            findings.append(too_long())
        return value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if _MIN_INT <= value < _MAX_INT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item, (*keys, key), findings) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*keys, index), findings) for index, item in enumerate(value)]
    return None if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _nul(keys: Keys) -> Finding:
    return Finding("nul-character", "the text has a NUL character in it", keys)


def _lower(error: Exception) -> str:
    text = " ".join(str(error).split())[:100].rstrip(".")
    return text[:1].lower() + text[1:]
