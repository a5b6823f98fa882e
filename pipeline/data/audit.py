"""What a file's rows look like in numbers, counted while they are checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.rows import Demonstration, Message, Preference

_EXACT_BITS = 9
"""Values below 2^9 are told apart exactly; of larger ones, the first nine bits. Their number stays small."""
_BIAS_ROWS = 30
_BIAS_SHARE = 0.7


@dataclass
class Measure:
    """A distribution in memory that does not grow with the number of values."""

    count: int = 0
    total: int = 0
    smallest: int = 0
    largest: int = 0
    _values: Counter[int] = field(default_factory=Counter)
    """How often each value was met, those from 512 on rounded down by less than 0.4 %."""

    def add(self, value: int) -> None:
        """Counts one value."""
        if not self.count:
            self.smallest = self.largest = value
        elif value < self.smallest:
            self.smallest = value
        elif value > self.largest:
            self.largest = value
        self.count += 1
        self.total += value
        self._values[value if -512 < value < 512 else _rounded(value)] += 1

    def fold(self, other: Measure) -> None:
        """Counts all that the other one counted."""
        if other.count:
            self.smallest = min(self.smallest, other.smallest) if self.count else other.smallest
            self.largest = max(self.largest, other.largest) if self.count else other.largest
            self.count += other.count
            self.total += other.total
            self._values.update(other._values)

    def quantile(self, share: float) -> int:
        """The smallest value that at least `share` of all values do not exceed; 0 where there is none."""
        rank, met = share * self.count, 0
        for value in sorted(self._values):
            met += self._values[value]
            if met >= rank:
                return max(value, self.smallest)
        return 0

    def as_dict(self) -> dict[str, Any]:
        """Count, mean, minimum, median, 95th percentile and maximum."""
        return {
            "count": self.count,
            "mean": self.mean,
            "min": self.smallest,
            "p50": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": self.largest,
        }

    @property
    def mean(self) -> float:
        """To two decimals; 0 of nothing."""
        return round(self.total / self.count, 2) if self.count else 0.0


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
    longer: Counter[str] = field(default_factory=Counter)
    """How many preferences have `chosen` longer, `rejected` longer, or both `equal` in length."""
    difference: Measure = field(default_factory=Measure)
    """Characters of `chosen` less those of `rejected`."""

    def add(self, row: Demonstration | Preference, format: str) -> None:
        """Counts one row."""
        self.formats[format] += 1
        sizes = {}
        turns = 0
        for name, text in _fields(row).items():
            sizes[name] = len(text) if isinstance(text, str) else sum([len(turn["content"]) for turn in text])
            self.characters.setdefault(name, Measure()).add(sizes[name])
            if name != "rejected":
                turns += 1 if isinstance(text, str) else len(text)
        self.turns.add(turns)
        if "rejected" in sizes:
            difference = sizes["chosen"] - sizes["rejected"]
            self.difference.add(difference)
            self.longer["chosen" if difference > 0 else "rejected" if difference else "equal"] += 1

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
        self.longer.update(other.longer)
        self.difference.fold(other.difference)

    @property
    def bias(self) -> str | None:
        """What a model may learn of length instead of quality, in words; None: nothing stands out.

        That is: of at least thirty preferences, seven in ten or more have the same side longer.
        """
        for side, word in (("chosen", "longer"), ("rejected", "shorter")):
            share = self.longer[side] / max(self.difference.count, 1)
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
            counts["length"] = {
                "chosen_longer": self.longer["chosen"],
                "rejected_longer": self.longer["rejected"],
                "equal": self.longer["equal"],
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


def _fields(row: Demonstration | Preference) -> dict[str, str | list[Message]]:
    if isinstance(row, Preference):
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    if row.messages is None:
        return {"prompt": row.prompt or "", "completion": row.completion or ""}
    if cut := row.prompt_turns:
        return {"prompt": row.messages[:cut], "completion": row.messages[cut:]}
    return {"messages": row.messages}
