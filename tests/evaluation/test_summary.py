from __future__ import annotations

import dataclasses
import math

import pytest

from pipeline.evaluation.generation import Answer
from pipeline.evaluation.intervals import proportion, proportion_difference
from pipeline.evaluation.summary import Measured, differences, figures

BASE = Measured(
    answers=[Answer("a", 4, True), Answer("b", 8, False), Answer("c", 6, True)],
    checks=[
        {"ends_by_itself": True, "match/f": False},
        {"ends_by_itself": False},
        {"ends_by_itself": True, "match/f": False},
    ],
    logps=[-4 * math.log(2), -2 * math.log(4)],
    tokens=[4, 2],
    margins=None,
)
TUNED = Measured(
    answers=[Answer("a", 5, True), Answer("b", 5, True), Answer("c", 5, True)],
    checks=[
        {"ends_by_itself": True, "match/f": True},
        {"ends_by_itself": True},
        {"ends_by_itself": True, "match/f": False},
    ],
    logps=[-2 * math.log(2), -1 * math.log(4)],
    tokens=[4, 2],
    margins=[0.5, -0.25, 0.75, 0.0],
)


def test_figures() -> None:
    """Perplexity: 4 ln 2 + 2 ln 4 = 8 ln 2 nats on 6 tokens, 2^(8/6). The margin 0 is no preference."""
    metrics, absent = figures(TUNED, seed=0)
    assert absent == {}
    assert set(metrics) == {
        "ends_by_itself", "match/f", "preference_accuracy", "preference_margin", "perplexity", "length_mean",
        "repetition",
    }  # fmt: skip
    assert metrics["match/f"] == proportion([True, False])
    assert metrics["preference_accuracy"] == proportion([True, False, True, False])
    assert (metrics["preference_margin"].value, metrics["preference_margin"].n) == (0.25, 4)
    assert (metrics["length_mean"].value, metrics["length_mean"].low, metrics["length_mean"].n) == (5, 5, 3)

    metrics, _ = figures(BASE, seed=0)
    assert set(metrics) == {"ends_by_itself", "match/f", "perplexity", "length_mean", "repetition"}
    assert metrics["ends_by_itself"].value == pytest.approx(2 / 3)
    assert metrics["perplexity"].value == pytest.approx(2 ** (8 / 6))
    assert metrics["length_mean"].value == 6
    assert metrics["repetition"].value == 0


def test_differences() -> None:
    deltas = differences(TUNED, BASE, seed=0)
    assert set(deltas) == {"ends_by_itself", "match/f", "perplexity", "length_mean", "repetition"}
    assert deltas["match/f"] == proportion_difference([True, False], [False, False])
    assert deltas["perplexity"].value == pytest.approx(2 ** (4 / 6) - 2 ** (8 / 6))
    # Row by row 1, -3, -1: not the difference of two resampled means.
    assert (deltas["length_mean"].value, deltas["length_mean"].low, deltas["length_mean"].high) == (-1, -3, 1)


def test_margins_are_paired_where_both_have_a_reference() -> None:
    other = dataclasses.replace(TUNED, margins=[0.5, 0.25, 0.75, -1.0])
    deltas = differences(TUNED, other, seed=0)
    assert deltas["preference_margin"].value == pytest.approx((0 - 0.5 + 0 + 1) / 4)
    assert deltas["preference_accuracy"] == proportion_difference([True, False, True, False], [True, True, True, False])


def test_nothing_asked_is_nothing_measured() -> None:
    nothing = Measured([], [], [], [], [])
    assert figures(nothing, seed=0) == ({}, {})
    assert differences(nothing, nothing, seed=0) == {}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_absent_with_a_reason(broken: float) -> None:
    diverged = dataclasses.replace(TUNED, logps=[-1.0, -abs(broken)], margins=[0.5, broken, 0.5, 0.5])
    metrics, absent = figures(diverged, seed=0)
    assert set(absent) == {"perplexity", "preference_margin", "preference_accuracy"}
    assert set(metrics) == {"ends_by_itself", "match/f", "length_mean", "repetition"}
    assert set(differences(diverged, TUNED, seed=0)) == {"ends_by_itself", "match/f", "length_mean", "repetition"}
    assert set(differences(TUNED, diverged, seed=0)) == {"ends_by_itself", "match/f", "length_mean", "repetition"}
