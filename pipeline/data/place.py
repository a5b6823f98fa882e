"""A finding in a row, and the words and marks that show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Keys = tuple[str | int, ...]
"""The way from the root of a row to a value: keys of objects and indices of arrays."""

MAX_FINDINGS_PER_ROW = 1000
"""More are neither kept nor counted, so that one monstrous row cannot fill the memory with findings."""

_SHOWN = 60
"""Characters of a user's text that a message or a pointer's key may carry."""
_EXCERPT = 96
"""Characters of the offending line that an excerpt carries."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a row, before it is known where in the file the row stands.

    Args:
        code: one of `codes.MENDS`.
        message: the cause in one short sentence.
        keys: the value it is about; None where the row could not be read.
        offset: index into the text that holds the row; None: where `keys` stands.
        mend: None: the usual mend for the code.
    """

    code: str
    message: str
    keys: Keys | None = ()
    offset: int | None = None
    mend: str | None = None


class Excerpt(NamedTuple):
    """A piece of one line of a file, with nothing in it that a terminal would act on."""

    text: str
    caret: int
    """Index into `text` of the character that is meant."""


def printable(text: str) -> str:
    """`text`, character for character, with those replaced that a terminal or UTF-8 cannot carry."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text)


def shown(text: str) -> str:
    """`text` on one line, cut to a length that fits into a message."""
    head = printable(text[: _SHOWN + 1])
    return head if len(head) <= _SHOWN else head[: _SHOWN - 1] + "…"


def pointer(keys: Keys) -> str:
    """The JSON pointer of RFC 6901. Overlong keys are cut, and unpaired surrogates written as escapes."""
    steps = (
        (key if len(key) <= _SHOWN else key[: _SHOWN - 1] + "…") if isinstance(key, str) else str(key) for key in keys
    )
    text = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def line_and_column(text: str, offset: int, start: int, line: int) -> tuple[int, int]:
    """Line and column (both from 1) of `offset`, given that `start` stands on `line`."""
    return line + text.count("\n", start, offset), offset - text.rfind("\n", 0, offset)


def excerpt(text: str, offset: int) -> Excerpt:
    """The part of the line around `offset` that fits into a terminal."""
    offset = min(offset, len(text))
    begin = text.rfind("\n", 0, offset) + 1
    end = text.find("\n", offset)
    end = len(text) if end < 0 else end
    first = max(begin, min(offset - _EXCERPT // 3, end - _EXCERPT))
    last = min(end, first + _EXCERPT)
    before, after = "…" if first > begin else "", "…" if last < end else ""
    return Excerpt(f"{before}{printable(text[first:last])}{after}".rstrip(), len(before) + offset - first)
