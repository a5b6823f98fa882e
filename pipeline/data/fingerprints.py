"""What is kept of each row after it has passed: hashes, by which rows and prompts are found again.

A row takes 24 bytes here (16 where there are no preferences, 8 more in a JSON array) and each prompt it answers 12;
looking for copies takes up to 12 more a row for a moment. That two different texts have the same hash of 64 bits has a
chance of 3 in a million among ten million rows; what hangs on it is a warning.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

from pipeline.data.rows import Demonstration, Message, Preference

_SYSTEM = ("system", "developer")


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
            frame = _digest(row.prompt) + (json.dumps(row.tools, sort_keys=True).encode() if row.tools else b"")
            chosen, rejected = _digest(row.chosen), _digest(row.rejected)
            self.rows.append(_number(frame + chosen + rejected))
            self._opposites.append(_number(frame + rejected + chosen))
        else:
            parts = [_digest(part) for part in (row.messages, row.prompt, row.completion) if part is not None]
            frame = json.dumps([row.prompt_turns, row.trained_turns, row.tools], sort_keys=True).encode()
            self.rows.append(_number(b"".join(parts) + frame))
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
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _prompts(row: Demonstration | Preference) -> Iterator[int]:
    """A hash of all that comes before each answer that is trained on, but for the system's turns."""
    hashed = blake2b(digest_size=8)
    only: tuple[int, ...] | None = None
    if isinstance(row, Preference):
        turns, trained = row.prompt, None
    elif row.messages is None:
        turns, trained = row.prompt or "", None
    else:
        turns, trained, only = row.messages, row.prompt_turns, row.trained_turns
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    for number, turn in enumerate(turns):
        role = turn["role"]
        if role == "assistant" and trained is not None and number >= trained and (only is None or number in only):
            yield int.from_bytes(hashed.digest(), "little")
        if role not in _SYSTEM:
            hashed.update(_bytes(f"{role}\0{normalised(turn['content'])}\0"))
    if trained is None:
        yield int.from_bytes(hashed.digest(), "little")


def _digest(part: str | list[Message]) -> bytes:
    """16 bytes; valid rows have no NUL in them, so it can stand between their parts."""
    if isinstance(part, str):
        text = part
    else:
        text = "\0".join(
            [
                f"{turn['role']}\0{turn['content']}" if len(turn) == 2 else json.dumps(turn, sort_keys=True) + "\0"
                for turn in part
            ]
        )
        text += "\0"
    return blake2b(_bytes(text), digest_size=16).digest()


def _number(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
