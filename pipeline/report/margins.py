"""The reward margins of held-out pairs: how they are spread, and the pairs that a version gets most wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.wording import last_said
from pipeline.report.answers import marked

MOST_BINS = 24
_WRONG = 10


@dataclass(frozen=True)
class Bar:
    """How many pairs have a margin from `low` to below `high`."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """The margins of one version."""

    model: str
    bars: list[Bar]
    highest: int
    """The count of the highest bar."""
    summary: str

    @property
    def edges(self) -> list[tuple[int, float]]:
        """Where the axis is labelled: the bar that begins there, and the margin. The ends, and 0."""
        zero = next(at for at, bar in enumerate([*self.bars, Bar(self.bars[-1].high, 0, 0)]) if bar.low > -1e-12)
        ends = [(0, self.bars[0].low), (zero, 0.0), (len(self.bars), self.bars[-1].high)]
        return sorted(dict(reversed(ends)).items())


def histograms(pairs: Sequence[Mapping[str, Any]]) -> list[Histogram]:
    """One for each version that has margins, on one axis, with a bin's edge at 0."""
    by_model = {
        name: [value for pair in pairs if (value := pair["margins"].get(name)) is not None]
        for name in dict.fromkeys(name for pair in pairs for name in pair["margins"])
    }
    by_model = {name: values for name, values in by_model.items() if values}
    if not by_model:
        return []
    everything = [value for values in by_model.values() for value in values]
    width = _width(min(everything), max(everything))
    first = math.floor(min(*everything, 0.0) / width)
    last = math.floor(max(*everything, 0.0) / width)
    found = []
    for name, values in by_model.items():
        counts = [0] * (last - first + 1)
        for value in values:
            counts[math.floor(value / width) - first] += 1
        bars = [Bar((first + at) * width, (first + at + 1) * width, count) for at, count in enumerate(counts)]
        above = sum(value > 0 for value in values)
        summary = (
            f"{name}: {above} of {len(values)} pairs above 0; median {statistics.median(values):.3g}, "
            f"from {min(values):.3g} to {max(values):.3g}"
        )
        found.append(Histogram(name, bars, max(counts), summary))
    return found


def _width(low: float, high: float) -> float:
    """A round bin width, so that some `MOST_BINS` bins at most span the margins and 0."""
    span = max(max(high, 0.0) - min(low, 0.0), 1e-6)
    rough = span / (MOST_BINS - 2)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def most_wrong(pairs: Sequence[Mapping[str, Any]], model: str, count: int = _WRONG) -> list[dict[str, Any]]:
    """The pairs with the lowest margins of `model`, the lowest first, as texts; the rejected ones marked.

    Above 0 a pair is not wrong, only the least right: `margin` says which.
    """
    known = [pair for pair in pairs if pair["margins"].get(model) is not None]
    worst = sorted(known, key=lambda pair: pair["margins"][model])[:count]
    return [
        {
            "prompt": last_said(pair["prompt"], "user"),
            "chosen": last_said(pair["chosen"]),
            "rejected": marked(last_said(pair["rejected"]), last_said(pair["chosen"])),
            "margin": pair["margins"][model],
            "margins": pair["margins"],
        }
        for pair in worst
    ]
