"""One row as a reader hands it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.data.place import Finding

MAX_ROW_BYTES = 16 * 2**20
"""The longest line of a JSONL file, and the longest element of a JSON array (there counted in characters)."""


@dataclass(slots=True)
class SourceRow:
    """One row as it stands in the file."""

    line: int | None
    """The line on which the row begins, from 1; None: the file has no lines."""
    index: int | None
    """The row's index in a JSON array or a table; None in JSONL and CSV."""
    text: str
    """What holds the row: its line, or the whole array; empty for a row of a table."""
    start: int
    """Where in `text` the row begins."""
    value: Any = None
    readable: bool = False
    """Whether `value` holds the row."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with the row as a text."""

    @property
    def number(self) -> int:
        """The row's line or, without lines, its number, both from 1."""
        return self.line or (self.index or 0) + 1


def too_long() -> Finding:
    """The finding that a row is longer than `MAX_ROW_BYTES`."""
    return Finding("row-too-long", f"longer than {MAX_ROW_BYTES // 2**20} MiB", None)
