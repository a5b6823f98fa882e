"""What a file's rows look like in numbers, counted while they are checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.rows import Demonstration, Message, Preference

_EXACT_BITS = 9
"""Values below 2^9 are told apart exactly; of larger ones, the first nine bits. Their number stays small."""
_AT_ONCE = 4096
_BIAS_ROWS = 30
_BIAS_SHARE = 0.7


class Measure:
    """A distribution in memory that does not grow with the number of values."""

    def __init__(self) -> None:
        self._count = self._total = self._smallest = self._largest = 0
        self._values: Counter[int] = Counter()
        """How often each value was met, those from 512 on rounded down by less than 0.4 %."""
        self._new: list[int] = []
        """Values not counted yet: many at once are counted in a tenth of the time."""

    def add(self, value: int) -> None:
        """Counts one value."""
        self._new.append(value)
        if len(self._new) >= _AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        new, self._new = self._new, []
        if new:
            self._smallest = min(min(new), self._smallest) if self._count else min(new)
            self._largest = max(max(new), self._largest) if self._count else max(new)
            self._count += len(new)
            self._total += sum(new)
            self._values.update([value if -512 < value < 512 else _rounded(value) for value in new])

    def fold(self, other: Measure) -> None:
        """Counts all that the other one counted."""
        self._settle()
        other._settle()
        if other._count:
            self._smallest = min(self._smallest, other._smallest) if self._count else other._smallest
            self._largest = max(self._largest, other._largest) if self._count else other._largest
            self._count += other._count
            self._total += other._total
            self._values.update(other._values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measure):
            return NotImplemented
        return self.as_dict() == other.as_dict() and self._values == other._values

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def count(self) -> int:
        """How many values."""
        self._settle()
        return self._count

    def signs(self) -> tuple[int, int, int]:
        """How many values are above, below and equal to zero; rounding changes no sign."""
        self._settle()
        above = sum(count for value, count in self._values.items() if value > 0)
        return above, self._count - above - self._values[0], self._values[0]

    def quantile(self, share: float) -> int:
        """The smallest value that at least `share` of all values do not exceed; 0 where there is none."""
        rank, met = share * self.count, 0
        for value in sorted(self._values):
            met += self._values[value]
            if met >= rank:
                return max(value, self._smallest)
        return 0

    def as_dict(self) -> dict[str, Any]:
        """Count, mean, minimum, median, 95th percentile and maximum."""
        return {
            "count": self.count,
            "mean": self.mean,
            "min": self._smallest,
            "p50": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": self._largest,
        }

    @property
    def mean(self) -> float:
        """To two decimals; 0 of nothing."""
        return round(self._total / self.count, 2) if self.count else 0.0


@dataclass
class Audit:
    """Counts over the valid rows of a file, or of several."""

    formats: Counter[str] = field(default_factory=Counter)
    """Rows of each format."""
    characters: dict[str, Measure] = field(default_factory=dict)
    """Length of each field, a conversation's being that of all its contents."""
    turns: Measure = field(default_factory=Measure)
    duplicate_rows: int = 0
    """Rows that are the same as an earlier one."""
    opposite_rows: int = 0
    """Preferences for which an earlier one, on the same prompt, prefers it the other way round."""
    near_duplicates: dict[str, int] | None = None
    """Rows `compared` and rows `found`; None: they were not looked for."""
    difference: Measure = field(default_factory=Measure)
    """Characters of `chosen` less those of `rejected`."""

    def add(self, row: Demonstration | Preference, format: str) -> None:
        """Counts one row."""
        self.formats[format] += 1
        characters, turns = self.characters, 0
        sizes = [(name, _size(part), 1 if isinstance(part, str) else len(part)) for name, part in _fields(row)]
        for name, size, count in sizes:
            if name not in characters:
                characters[name] = Measure()
            characters[name].add(size)
            if name != "rejected":
                turns += count
        self.turns.add(turns)
        if isinstance(row, Preference):
            self.difference.add(sizes[1][1] - sizes[2][1])

    def fold(self, other: Audit) -> None:
        """Counts all that the other one counted."""
        self.formats.update(other.formats)
        for name, measure in other.characters.items():
            self.characters.setdefault(name, Measure()).fold(measure)
        self.turns.fold(other.turns)
        self.duplicate_rows += other.duplicate_rows
        self.opposite_rows += other.opposite_rows
        if other.near_duplicates is not None:
            near = Counter(self.near_duplicates or {})
            near.update(other.near_duplicates)
            self.near_duplicates = dict(near)
        self.difference.fold(other.difference)

    @property
    def bias(self) -> str | None:
        """What a model may learn of length instead of quality, in words; None: nothing stands out.

        That is: of at least thirty preferences, seven in ten or more have the same side longer.
        """
        for count, word in zip(self.difference.signs(), ("longer", "shorter"), strict=False):
            share = count / max(self.difference.count, 1)
            if self.difference.count >= _BIAS_ROWS and share >= _BIAS_SHARE:
                mean, median = abs(self.difference.mean), abs(self.difference.quantile(0.5))
                by = f"mean {mean:,.0f}, median {median:,} characters"
                return f"`chosen` is the {word} one in {share:.0%} of the rows ({by})"
        return None

    def as_dict(self) -> dict[str, Any]:
        """`characters` by field and `turns` (of a preference, the chosen ones) as distributions, and counts."""
        counts: dict[str, Any] = {
            "formats": dict(self.formats),
            "characters": {name: measure.as_dict() for name, measure in self.characters.items()},
            "turns": self.turns.as_dict(),
            "duplicate_rows": self.duplicate_rows,
        }
        if self.near_duplicates is not None:
            counts["near_duplicates"] = self.near_duplicates
        if self.difference.count:
            counts["opposite_rows"] = self.opposite_rows
            chosen_longer, rejected_longer, equal = self.difference.signs()
            counts["length"] = {
                "chosen_longer": chosen_longer,
                "rejected_longer": rejected_longer,
                "equal": equal,
                "mean_difference": self.difference.mean,
                "median_difference": self.difference.quantile(0.5),
            }
        return counts


def merge(audits: Iterable[Audit]) -> dict[str, Any]:
    """One audit over several files; what belongs to one file alone (its hash) is left out."""
    together = Audit()
    for audit in audits:
        together.fold(audit)
    return together.as_dict()


def _rounded(value: int) -> int:
    shift = value.bit_length() - _EXACT_BITS
    return value if shift <= 0 else (value >> shift) << shift


def _size(part: str | list[Message]) -> int:
    """Characters; of a conversation, those of all its contents."""
    return len(part) if isinstance(part, str) else sum([len(turn["content"]) for turn in part])


def _fields(row: Demonstration | Preference) -> tuple[tuple[str, str | list[Message]], ...]:
    if isinstance(row, Preference):
        return ("prompt", row.prompt), ("chosen", row.chosen), ("rejected", row.rejected)
    if row.messages is None:
        return ("prompt", row.prompt or ""), ("completion", row.completion or "")
    if cut := row.prompt_turns:
        return ("prompt", row.messages[:cut]), ("completion", row.messages[cut:])
    return (("messages", row.messages),)
