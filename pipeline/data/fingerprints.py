"""What is kept of each row after it has passed: hashes, by which rows and prompts are found again.

A row takes 24 bytes here (16 where there are no preferences, 8 more in a JSON array) and each prompt it answers 12;
looking for copies takes up to 12 more a row for a moment. That two different texts have the same hash of 64 bits has a
chance of 3 in a million among ten million rows; what hangs on it is a warning. (So the hash may be XXH3, which takes a
tenth of the time of a cryptographic one and can be made to collide by who wants to.)
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from pipeline.data.rows import Demonstration, Message, Preference

_SYSTEM = ("system", "developer")
_MASK = 2**64 - 1
_FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
"""Two odd numbers: by them the hashes of the two answers count differently, so that the order is part of the sum."""


class Place(NamedTuple):
    """Where a row begins."""

    line: int
    element: int | None
    """Its index where the file is one array."""

    def __str__(self) -> str:
        return f"line {self.line}" + ("" if self.element is None else f" (/{self.element})")

    def of(self, file: str) -> str:
        """The same behind the name of its file."""
        return f"{file}:{self.line}" + ("" if self.element is None else f" (/{self.element})")


class Fingerprints:
    """The hashes of the rows of one file, in their order."""

    def __init__(self) -> None:
        self.prompts = array("Q")
        """Of each prompt that is answered in the file, however it is cased, spaced and encoded."""
        self._prompt_rows = array("I")
        """Of each of them, the number of its row."""
        self.rows = array("Q")
        """Of each row, all that is trained on."""
        self._opposites = array("Q")
        """For a preference, the hash of the row that prefers it the other way round."""
        self._lines = array("Q")
        self._indices = array("Q")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Demonstration | Preference, index: int | None) -> None:
        """Takes one row's."""
        if isinstance(row, Preference):
            frame = xxh3_64_intdigest(_bytes(_text(row.prompt)) + (_plain(row.tools) if row.tools else b""))
            chosen, rejected = (
                xxh3_64_intdigest(_bytes(_text(row.chosen))),
                xxh3_64_intdigest(_bytes(_text(row.rejected))),
            )
            self.rows.append((frame + _FIRST * chosen + _SECOND * rejected) & _MASK)
            self._opposites.append((frame + _FIRST * rejected + _SECOND * chosen) & _MASK)
        else:
            text = f"{row.prompt}\0{row.completion}" if row.messages is None else _text(row.messages)
            self.rows.append(xxh3_64_intdigest(_bytes(text) + _plain([row.prompt_turns, row.trained_turns, row.tools])))
        for prompt in _prompts(row):
            self.prompts.append(prompt)
            self._prompt_rows.append(len(self._lines))
        self._lines.append(row.line)
        if index is not None:
            self._indices.append(index)

    def extend(self, other: Fingerprints, lines: int) -> None:
        """Takes those of the rows that follow in the file.

        Args:
            other: theirs, with lines counted from 1.
            lines: how many lines of the file come before them.
        """
        self._prompt_rows.extend(array("I", [len(self) + number for number in other._prompt_rows]))
        self.prompts.extend(other.prompts)
        self.rows.extend(other.rows)
        self._opposites.extend(other._opposites)
        self._lines.extend(array("Q", [line + lines for line in other._lines]))
        self._indices.extend(other._indices)

    def place(self, number: int) -> Place:
        """Of the row with this number, from 0."""
        return Place(self._lines[number], self._indices[number] if self._indices else None)

    def prompt_row(self, number: int) -> int:
        """The number of the row that answers the prompt with this number, both from 0."""
        return self._prompt_rows[number]

    def forget_opposites(self) -> None:
        """Keeps what finds rows and prompts in other files, and no more."""
        self._opposites = array("Q")

    def repeats(self) -> Iterator[tuple[int, int, bool]]:
        """Rows that an earlier row equals or contradicts: the numbers of both, and whether they are equal."""
        index = Index(self.rows)
        opposites = self._opposites
        for number, row in enumerate(self.rows):
            if (first := index.add(number, row)) is not None:
                yield number, first, True
            elif opposites and (against := index.find(opposites[number])) is not None:
                yield number, against, False


class Index:
    """Finds hashes in an array of them: open addressing with linear probing, 6 to 12 bytes a hash beside the array.

    Args:
        hashes: what is to be found; the index is empty until `add` or `fill`.
    """

    def __init__(self, hashes: array[int]) -> None:
        self._hashes = hashes
        size = 1 << (len(hashes) * 3 // 2).bit_length()
        self._mask = size - 1
        self._slots = array("I", bytes(4 * size))
        """Number of a hash plus one; 0: free."""

    def fill(self) -> Index:
        """With all the hashes; of equal ones, the first is found."""
        for number, value in enumerate(self._hashes):
            self.add(number, value)
        return self

    def add(self, number: int, value: int) -> int | None:
        """Makes the hash with this number findable, unless an equal one is; that one's number."""
        slots, hashes, mask = self._slots, self._hashes, self._mask
        slot = value & mask
        while taken := slots[slot]:
            if hashes[taken - 1] == value:
                return taken - 1
            slot = (slot + 1) & mask
        slots[slot] = number + 1
        return None

    def find(self, value: int) -> int | None:
        """The number of an equal hash."""
        slots, hashes, mask = self._slots, self._hashes, self._mask
        slot = value & mask
        while taken := slots[slot]:
            if hashes[taken - 1] == value:
                return taken - 1
            slot = (slot + 1) & mask
        return None


def normalised(text: str) -> str:
    """The text with case, runs of white space and compatibility characters made alike."""
    if text.isascii():
        if text.isprintable() and "  " not in text:  # no white space but single spaces: there is nothing to split
            return text.lower().strip()
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _prompts(row: Demonstration | Preference) -> Iterator[int]:
    """A hash of all that comes before each answer that is trained on, but for the system's turns."""
    if isinstance(row, Preference):
        turns = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        yield xxh3_64_intdigest(b"".join([_said(turn) for turn in turns]))
    elif row.messages is None:
        yield xxh3_64_intdigest(_said({"role": "user", "content": row.prompt or ""}))
    else:
        hashed, only = xxh3_64(), row.trained_turns
        for number, turn in enumerate(row.messages):
            if turn["role"] == "assistant" and number >= row.prompt_turns and (only is None or number in only):
                yield hashed.intdigest()
            hashed.update(_said(turn))


def _said(turn: Message) -> bytes:
    """What of a turn counts in a prompt; nothing of the system's."""
    role = turn["role"]
    return b"" if role in _SYSTEM else _bytes(f"{role}\0{normalised(turn['content'])}\0")


def _text(part: str | list[Message]) -> str:
    """All that is said; valid rows have no NUL in them, so it can stand between their parts."""
    if isinstance(part, str):
        return part
    parts = [
        f"{turn['role']}\0{turn['content']}\0" if len(turn) == 2 else json.dumps(turn, sort_keys=True) + "\0\0"
        for turn in part
    ]
    return "".join(parts)


def _plain(value: Any) -> bytes:
    return b"\0" + json.dumps(value, sort_keys=True).encode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
