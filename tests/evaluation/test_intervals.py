"""Expected intervals are the published worked examples, or written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.intervals import Estimate, bootstrap, mean, proportion, proportion_difference, ratio


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # n successes: the lower bound is n / (n + z²) = 10 / 13.8415.
        (10, 10, 0.7225, 1.0000),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    estimate = proportion([True] * successes + [False] * (n - successes))
    assert estimate.value == successes / n
    assert estimate.n == n
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_exactly_at_the_ends() -> None:
    for n in range(1, 200):
        assert proportion([False] * n).low == 0.0
        assert proportion([True] * n).high == 1.0


def paired(both: int, only: int, only_base: int, neither: int) -> tuple[list[bool], list[bool]]:
    outcomes = [True] * (both + only) + [False] * (only_base + neither)
    base = [True] * both + [False] * only + [True] * only_base + [False] * neither
    return outcomes, base


def test_paired_difference_as_published() -> None:
    """Newcombe 1998, "... based on paired data", table II: 36, 12, 2 and 0 of 50 pairs, method 10."""
    estimate = proportion_difference(*paired(36, 12, 2, 0))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_paired_difference_corrects_agreement_for_continuity() -> None:
    """14, 5, 0 and 22 of 41 pairs: the correlation is (14 * 22 - 41 / 2) / √(19 * 22 * 14 * 27) = 0.7233.

    Wilson: 0.3206 to 0.6125 around 19 of 41, 0.2156 to 0.4945 around 14 of 41. With the distances 0.1429 and 0.1530,
    5/41 - √(0.1429² - 2 * 0.7233 * 0.1429 * 0.1530 + 0.1530²) = 0.0115; with 0.1259 and 0.1491 upwards 0.2265.
    """
    estimate = proportion_difference(*paired(14, 5, 0, 22))
    assert (estimate.low, estimate.high) == pytest.approx((0.0115, 0.2265), abs=5e-5)


def test_paired_difference_by_hand() -> None:
    """No agreement to correct for (2·2 = 2·2, so φ = 0): 4 of 8 against 4 of 8.

    Wilson for 4 of 8 is 0.5 ± z/(1 + z²/8) · √(0.25/8 + z²/256) with z² = 3.8415: 0.5 ± 0.2848, and the
    interval is ±√(0.2848² + 0.2848²) = ±0.4028.
    """
    estimate = proportion_difference(*paired(2, 2, 2, 2))
    assert estimate == Estimate(0.0, pytest.approx(-0.4028, abs=1e-4), pytest.approx(0.4028, abs=1e-4), 8)


def test_paired_difference_at_the_ends_is_no_point() -> None:
    """0 of 50 becomes 50 of 50. Wilson: 0 to 0.0713 and 0.9287 to 1; 1 - √(0.0713² + 0.0713²) = 0.8991."""
    estimate = proportion_difference(*paired(0, 50, 0, 0))
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.8991, abs=1e-4)


def test_paired_difference_changes_sign_with_its_sides() -> None:
    outcomes, base = paired(12, 9, 2, 7)
    one, other = proportion_difference(outcomes, base), proportion_difference(base, outcomes)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.value == pytest.approx(7 / 30)


def test_agreement_narrows_the_paired_difference() -> None:
    """The same two proportions, 20 of 40 and 15 of 40, once on nearly the same prompts and once on others."""
    agreeing = proportion_difference(*paired(15, 5, 0, 20))
    crossing = proportion_difference(*paired(0, 20, 15, 5))
    assert agreeing.value == crossing.value == 0.125
    assert agreeing.high - agreeing.low < 0.7 * (crossing.high - crossing.low)


def test_bootstrap_of_two_values() -> None:
    """Resamples of {0, 1} have the means 0, ½ and 1 with probabilities ¼, ½, ¼: the quantiles are 0 and 1."""
    assert mean([0.0, 1.0], seed=0) == Estimate(0.5, 0.0, 1.0, 2)


def test_bootstrap_against_all_resamples() -> None:
    """The 5⁵ equally likely resamples give the exact quantiles."""
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    means = sorted(sum(rows) / 5 for rows in itertools.product(values, repeat=5))
    estimate = mean(values, seed=3)
    assert estimate.value == 6.2
    assert estimate.low == pytest.approx(means[int(0.025 * len(means))], abs=0.4)
    assert estimate.high == pytest.approx(means[int(0.975 * len(means))], abs=0.4)


def test_bootstrap_of_a_normal_sample() -> None:
    """For many rows the interval is the textbook one, mean ± 1.96 · s / √n."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    half = 1.96 * values.std() / math.sqrt(400)
    estimate = mean(values.tolist(), seed=0)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_seed_decides_the_resamples() -> None:
    values = [0.1, 0.7, 0.3, 0.9, 0.2, 0.8]
    assert mean(values, seed=5) == mean(values, seed=5)
    assert mean(values, seed=5) != mean(values, seed=6)


def test_what_overflows_is_not_finite() -> None:
    nats = np.array([1.0, 2000.0])
    estimate = bootstrap(lambda rows: np.exp(nats[rows].mean(axis=1)), 2, seed=0)
    assert estimate.value == math.inf
    assert not estimate.finite
    assert mean([1.0, 2.0], seed=0).finite
    assert not mean([1.0, math.nan], seed=0).finite


def test_nothing_has_no_estimate() -> None:
    with pytest.raises(ValueError, match="at least one"):
        proportion([])
    with pytest.raises(ValueError, match="at least one"):
        mean([], seed=0)
    with pytest.raises(ValueError, match="both sides: 1 and 2"):
        proportion_difference([True], [True, False])


def test_a_ratio_is_of_the_sums_and_its_interval_that_of_scipy() -> None:
    totals, counts = [1.0, 2.5, 0.2, 4.0, 3.3, 0.9, 2.2, 1.7], [3, 5, 1, 9, 4, 2, 6, 3]
    found = ratio(totals, counts, seed=3)
    assert found.value == pytest.approx(sum(totals) / sum(counts))
    theirs = stats.bootstrap(
        (np.array(totals), np.array(counts)),
        lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis),
        paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=0.02), pytest.approx(theirs.high, abs=0.02))
    with pytest.raises(ValueError, match="as many"):
        ratio([1.0], [1, 2], seed=0)


def test_wilson_is_that_of_scipy() -> None:
    for n in (1, 7, 50, 400):
        for successes in {0, 1, n // 3, n - 1, n}:
            found = proportion([True] * successes + [False] * (n - successes))
            theirs = stats.binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
            assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_the_bootstrap_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(5).gamma(2.0, size=60)  # skewed, so that the percentile interval is too
    found = mean(values.tolist(), seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    # Two bootstraps of 2,000 and 20,000 resamples: their ends differ by a few hundredths of the interval.
    width = theirs.high - theirs.low
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)
