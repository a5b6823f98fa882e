"""Rows that are nearly the same: MinHash and locality-sensitive hashing find candidates, counting decides.

Two rows are near duplicates where at least 80 % of the runs of three words that either has are in both. The system's
turns do not count: they are the same in every row of many data sets. See Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3. With 16 bands of 8 values a pair at 80 % is found with a probability of 95 %, at 90 % of 99.99 %.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from pipeline.data.fingerprints import normalised
from pipeline.data.rows import Demonstration, Message, Preference

if TYPE_CHECKING:
    from datasketch import MinHash

THRESHOLD = 0.8
MAX_ROWS = 50_000
"""How many rows of a file are compared; later ones are not, and the audit says so."""

_RUN = 3
_BANDS, _VALUES = 16, 8


class Near(NamedTuple):
    """A row that is nearly the same as an earlier one."""

    number: int
    earlier: int
    """Both from 0, among the rows that were added."""
    similarity: float
    """The share of runs of words that both have: 0.8 to 1."""


class NearDuplicates:
    """Compares each row that is added with all before it."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH  # takes half a second and numpy

        self.rows = 0
        self.found: list[Near] = []
        self._lsh = MinHashLSH(params=(_BANDS, _VALUES), num_perm=_BANDS * _VALUES)
        self._runs: list[array[int]] = []

    def add(self, row: Demonstration | Preference) -> None:
        """Compares one row."""
        if self.rows == MAX_ROWS:
            return
        number, self.rows = self.rows, self.rows + 1
        runs = _runs(row)
        minhash = _minhash(runs)
        self.found += self._closest(number, runs, minhash)
        self._lsh.insert(number, minhash, check_duplication=False)
        self._runs.append(array("I", runs))

    def in_other(self, other: NearDuplicates) -> Iterator[Near]:
        """The rows of `other` that are nearly the same as one here; `earlier` is the number of the row here."""
        for number, kept in enumerate(other._runs):
            runs = set(kept)
            yield from self._closest(number, runs, _minhash(runs))

    def _closest(self, number: int, runs: set[int], minhash: MinHash) -> list[Near]:
        """The nearest of the rows before, where one is near enough."""
        candidates = (self._near(number, runs, other) for other in self._lsh.query(minhash))
        best = max(candidates, default=None, key=_closeness)
        return [] if best is None or best.similarity < THRESHOLD else [best]

    def _near(self, number: int, runs: set[int], other: int) -> Near:
        both = len(runs.intersection(self._runs[other]))
        return Near(number, other, both / (len(runs) + len(self._runs[other]) - both))


def _closeness(near: Near) -> tuple[float, int]:
    return near.similarity, -near.earlier


def _minhash(runs: set[int]) -> MinHash:
    minhash = _empty().copy()
    minhash.update_batch(runs)
    return minhash


@cache
def _empty() -> MinHash:
    from datasketch import MinHash

    return MinHash(num_perm=_BANDS * _VALUES, hashfunc=int)


def _runs(row: Demonstration | Preference) -> set[int]:
    """A hash of each run of three words; of a text with fewer, of the whole text."""
    words = [word for text in _texts(row) for word in normalised(text).split()]
    count = max(1, len(words) - _RUN + 1)
    return {crc32(" ".join(words[start : start + _RUN]).encode("utf-8", "surrogatepass")) for start in range(count)}


def _texts(row: Demonstration | Preference) -> Iterator[str]:
    if isinstance(row, Preference):
        parts: tuple[str | list[Message] | None, ...] = (row.prompt, row.chosen, row.rejected)
    else:
        parts = (row.messages, row.prompt, row.completion)
    for part in parts:
        if isinstance(part, str):
            yield part
        elif part is not None:
            yield from (turn["content"] for turn in part if turn["role"] not in ("system", "developer"))
