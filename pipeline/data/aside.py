"""Rows that are not trained on: which, why, and the file in the run folder that keeps them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runs.files import write_atomically

SET_ASIDE = "set-aside.jsonl"
"""The file of a run folder that holds the rows that were set aside."""


@dataclass(frozen=True)
class SetAside:
    """A row that is not trained on."""

    file: str
    line: int | None
    """From 1, where the row begins; None: the file has no lines."""
    pointer: str
    """RFC 6901: empty in JSONL, where the row is its line; from the root in a JSON array."""
    reasons: list[tuple[str, str]]
    """Code and message of everything that is wrong with it."""
    row: Any
    """As it stands in the file; its line as text where it could not be read, its canonical form where only the
    tokenizer found something wrong."""

    @property
    def codes(self) -> list[str]:
        """Each code once, in the order of the reasons."""
        return list(dict.fromkeys(code for code, _ in self.reasons))

    def as_dict(self) -> dict[str, Any]:
        """One line of `set-aside.jsonl`."""
        return {
            "file": self.file,
            "line": self.line,
            "pointer": self.pointer,
            "codes": self.codes,
            "reasons": [{"code": code, "message": message} for code, message in self.reasons],
            "row": self.row,
        }


def count_codes(rows: Sequence[SetAside]) -> dict[str, int]:
    """How many of the rows have each code, the most frequent first."""
    return dict(Counter(code for row in rows for code in row.codes).most_common())


def write_set_aside(folder: Path, rows: Sequence[SetAside]) -> Path | None:
    """Writes the rows to `set-aside.jsonl` in `folder`, one a line; no file where there are none.

    The JSON is ASCII: an unpaired surrogate, which may be why a row is here, has no other form in a file. A row of a
    JSON array with NaN in it is kept as text.
    """
    if not rows:
        return None
    path = folder / SET_ASIDE
    write_atomically(path, "".join(_line(row.as_dict()) + "\n" for row in rows))
    return path


def _line(value: dict[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps({**value, "row": json.dumps(value["row"])})
