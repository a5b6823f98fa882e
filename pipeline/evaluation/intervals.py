"""95 % intervals: a figure from fifty prompts is an estimate, and says how good a one.

Proportions get closed-form score intervals, which stay honest at 0 % and 100 % where a bootstrap would
collapse to a point; everything else gets a seeded percentile bootstrap over the rows. Differences are always
paired: both models answered the same prompts, so what the prompts share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054
"""The standard normal's 97.5 % quantile."""
_RESAMPLES = 2000

Statistic = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Row indices `[R, n]` to one figure for each of the R resamples."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The estimate as `compare.json` holds it."""
        return asdict(self)

    @property
    def finite(self) -> bool:
        """Whether all of it can be written as JSON."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))


def proportion(outcomes: Sequence[bool]) -> Estimate:
    """The share of true outcomes with its Wilson score interval (Wilson 1927).

    Raises:
        ValueError: no outcomes.
    """
    n = len(outcomes)
    if n == 0:
        raise ValueError("a proportion needs at least one outcome")
    successes = sum(outcomes)
    low, high = _wilson(successes, n)
    return Estimate(successes / n, low, high, n)


def _wilson(successes: int, n: int) -> tuple[float, float]:
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At 0 and n the bound is 0 and 1 exactly; rounding would put it a hair beside the value.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def proportion_difference(outcomes: Sequence[bool], base: Sequence[bool]) -> Estimate:
    """How much larger the share of true `outcomes` is than that of `base`, row by row the same prompts.

    The interval is the paired score interval with continuity-corrected correlation, method 10 of Newcombe
    1998,
    "Improved confidence intervals for the difference between binomial proportions based on paired data".

    Raises:
        ValueError: no outcomes, or not as many on both sides.
    """
    n = len(outcomes)
    if n == 0 or n != len(base):
        raise ValueError(f"a paired difference needs as many outcomes on both sides: {n} and {len(base)}")
    pairs = list(zip(outcomes, base, strict=True))
    both = pairs.count((True, True))
    only = pairs.count((True, False))
    only_base = pairs.count((False, True))
    neither = n - both - only - only_base

    first, second = (both + only) / n, (both + only_base) / n
    first_low, first_high = _wilson(both + only, n)
    second_low, second_high = _wilson(both + only_base, n)
    margins = (both + only) * (only_base + neither) * (both + only_base) * (only + neither)
    agreement = float(both * neither - only * only_base)
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)
    correlation = agreement / math.sqrt(margins) if margins else 0.0

    below, above = first - first_low, second_high - second
    down = math.sqrt(below**2 - 2 * correlation * below * above + above**2)
    below, above = second - second_low, first_high - first
    up = math.sqrt(below**2 - 2 * correlation * below * above + above**2)
    difference = first - second
    return Estimate(difference, difference - down, difference + up, n)


def mean(values: Sequence[float], *, seed: int) -> Estimate:
    """The mean of `values` with its bootstrap interval; for a paired difference, give the differences.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda rows: array[rows].mean(axis=1), len(array), seed=seed)


def ratio(totals: Sequence[float], counts: Sequence[int], *, seed: int) -> Estimate:
    """The sum of `totals` over the sum of `counts`, e.g. a figure a token, with its bootstrap interval over rows.

    Raises:
        ValueError: no rows, or not as many of both.
    """
    above, below = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if len(above) != len(below):
        raise ValueError(f"a ratio needs as many totals as counts: {len(above)} and {len(below)}")
    return bootstrap(lambda rows: above[rows].sum(axis=1) / below[rows].sum(axis=1), len(above), seed=seed)


def bootstrap(statistic: Statistic, n: int, *, seed: int) -> Estimate:
    """`statistic` over n rows with its percentile bootstrap interval (Efron 1979), 2,000 resamples.

    The same seed and n draw the same rows, so that two runs over the same data print the same interval.

    Raises:
        ValueError: no rows.
    """
    if n == 0:
        raise ValueError("a bootstrap needs at least one row")
    resamples = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))
    # A statistic that overflows is told from `Estimate.finite`, not by numpy's warnings.
    with np.errstate(over="ignore", invalid="ignore"):
        value = statistic(np.arange(n, dtype=np.int64)[None])[0]
        low, high = np.quantile(statistic(resamples), [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)
