"""What a file's rows look like in numbers, counted while they are checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.rows import Demonstration, Message, Preference


@dataclass
class _Measure:
    count: int = 0
    total: float = 0
    largest: int = 0

    def add(self, value: int) -> None:
        self.count += 1
        self.total += value
        self.largest = max(self.largest, value)

    def as_dict(self) -> dict[str, Any]:
        mean = round(self.total / self.count, 2) if self.count else 0.0
        return {"count": self.count, "mean": mean, "max": self.largest}


@dataclass
class Audit:
    """Counts over the valid rows of one file."""

    formats: Counter[str] = field(default_factory=Counter)
    """Rows of each format."""
    duplicate_rows: int = 0
    """Rows that are the same as an earlier one."""
    _characters: dict[str, _Measure] = field(default_factory=dict)
    _turns: _Measure = field(default_factory=_Measure)

    def add(self, row: Demonstration | Preference, format: str) -> None:
        """Counts one row."""
        self.formats[format] += 1
        for name, text in _fields(row).items():
            size = len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
            self._characters.setdefault(name, _Measure()).add(size)
        self._turns.add(_count_turns(row))

    def as_dict(self) -> dict[str, Any]:
        """Mean and max a row of `characters` by field and of `turns` (of a preference, the chosen ones)."""
        return {
            "formats": dict(self.formats),
            "characters": {name: measure.as_dict() for name, measure in self._characters.items()},
            "turns": self._turns.as_dict(),
            "duplicate_rows": self.duplicate_rows,
        }


def merge(audits: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One audit over several files, from theirs; what belongs to one file alone (its hash) is left out."""
    formats: Counter[str] = Counter()
    characters: dict[str, _Measure] = {}
    turns = _Measure()
    duplicate_rows = 0
    for audit in audits:
        formats.update(audit["formats"])
        duplicate_rows += audit["duplicate_rows"]
        _fold(turns, audit["turns"])
        for name, measure in audit["characters"].items():
            _fold(characters.setdefault(name, _Measure()), measure)
    return Audit(formats, duplicate_rows, characters, turns).as_dict()


def _fold(into: _Measure, measure: dict[str, Any]) -> None:
    into.count += measure["count"]
    into.total += measure["mean"] * measure["count"]
    into.largest = max(into.largest, measure["max"])


def _fields(row: Demonstration | Preference) -> dict[str, str | list[Message]]:
    if isinstance(row, Preference):
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    if row.messages is None:
        return {"prompt": row.prompt or "", "completion": row.completion or ""}
    if cut := row.prompt_turns:
        return {"prompt": row.messages[:cut], "completion": row.messages[cut:]}
    return {"messages": row.messages}


def _count_turns(row: Demonstration | Preference) -> int:
    """Messages of a row; a text counts as one."""
    parts = [part for name, part in _fields(row).items() if name != "rejected"]
    return sum(1 if isinstance(part, str) else len(part) for part in parts)
