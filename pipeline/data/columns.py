"""Columns under names of their own: `--map COLUMN=FIELD`, and `map` of an experiment's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from pipeline.data.codes import MENDS
from pipeline.data.place import Finding, shown
from pipeline.errors import PipelineError

# fmt: off
FieldName = Literal[
    "messages", "tools", "prompt", "completion", "chosen", "rejected", "input", "preferred_output",
    "non_preferred_output", "instruction", "output", "system", "history", "conversations", "question",
    "chosen_response", "rejected_response",
]
# fmt: on
"""A top-level key that some format knows."""
FIELDS: tuple[str, ...] = get_args(FieldName)


def read_map(pairs: Sequence[str]) -> dict[str, str]:
    """Column to field, from `COLUMN=FIELD` as it is typed.

    Raises:
        PipelineError: not such a pair, a field that no format has, or the same column or field twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        column, equals, field = pair.rpartition("=")
        if not equals or not column or not field:
            raise _wrong(pair, "not COLUMN=FIELD", "write the file's name first: --map question=prompt")
        if field not in FIELDS:
            close = get_close_matches(field, FIELDS, 1)
            fields = ", ".join(sorted(FIELDS))
            mend = f"did you mean `{close[0]}`?" if close else f"use one of {fields}"
            raise _wrong(pair, f"no format has a field `{field}`", mend)
        if column in columns or field in columns.values():
            raise _wrong(pair, "the same column or field twice", "name each once")
        columns[column] = field
    return columns


def _wrong(pair: str, cause: str, mend: str) -> PipelineError:
    return PipelineError(f"`--map {pair}`: {cause}", code="bad-map", mend=mend)


class Columns:
    """Renames the columns of rows, and remembers which there were.

    Args:
        fields: column to field.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)
        self._names = {field: column for column, field in fields.items()}
        self._missing = dict.fromkeys(fields)
        self._present: dict[str, None] = {}

    def renamed(self, value: Any) -> Any:
        """The row with its columns under their fields; a column that already has such a name gives way."""
        if not self._fields or not isinstance(value, dict):
            return value
        for column in [column for column in self._missing if column in value]:
            del self._missing[column]
        if self._missing and len(self._present) < 1000:
            self._present.update(dict.fromkeys(value))
        taken = {field for field, column in self._names.items() if column in value}
        return {
            self._fields.get(key, key): item for key, item in value.items() if key in self._fields or key not in taken
        }

    def own(self, finding: Finding) -> Finding:
        """`finding`, about a field, at the column that the file has."""
        keys = finding.keys
        if not keys or keys[0] not in self._names:
            return finding
        return replace(finding, keys=(self._names[str(keys[0])], *keys[1:]))

    def missing(self) -> Iterator[PipelineError]:
        """Once all rows were seen: an error for each column that none of them had."""
        for column in self._missing:
            close = get_close_matches(column, self._present, 1)
            mend = f"did you mean `{shown(close[0])}`?" if close else MENDS["unknown-column"]
            yield PipelineError(f"no row has the column `{shown(column)}`", code="unknown-column", mend=mend)
