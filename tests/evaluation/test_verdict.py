"""The verdict: which version passes most, whether that is more than chance, and what speaks against it."""

from __future__ import annotations

import pytest

from pipeline.evaluation.intervals import Estimate, mean
from pipeline.evaluation.verdict import better, verdict_of


def rows(*passed: int, of: int = 2, named: str = "check/") -> list[dict[str, bool]]:
    """A prompt for each number: so many of its checks hold."""
    return [{f"{named}{at}": at < count for at in range(of)} for count in passed]


def test_the_score_is_the_mean_share_of_checks_passed() -> None:
    verdict = verdict_of({"base": rows(0, 1, 2, 1), "sft": rows(2, 2, 2, 1)}, {}, seed=3)
    assert verdict is not None
    assert (verdict.best, verdict.stated) == ("sft", True)
    assert verdict.scores["sft"] == mean([1, 1, 1, 0.5], seed=3)
    assert verdict.leads["base"] == mean([1, 0.5, 0, 0], seed=3)


def test_decided_only_beyond_chance() -> None:
    clear = verdict_of({"base": rows(*[0] * 20), "dpo": rows(*[2] * 20)}, {}, seed=0)
    assert clear is not None
    assert clear.decided
    assert clear.sentence == (
        "dpo should survive: it passes 100 % of the checks [100, 100], +100 points [+100, +100] against base."
    )
    close = verdict_of({"sft": rows(*[2] * 19, 0), "dpo": rows(*[2] * 20)}, {}, seed=0)
    assert close is not None
    assert (close.best, close.decided) == ("dpo", False)
    assert close.sentence.startswith("No version is better beyond chance: dpo passes 100 %")
    assert "not more than chance against sft" in close.sentence


def test_of_equal_ones_the_first_and_nothing_stated_says_so() -> None:
    ended = {name: rows(1, 1, of=1, named="") for name in ("base", "sft")}
    ended = {name: [{"ends_by_itself": True}] * 3 for name in ended}
    verdict = verdict_of(ended, {}, seed=0)
    assert verdict is not None
    assert (verdict.best, verdict.decided, verdict.stated) == ("base", False, False)
    assert "states no checks" in verdict.sentence


def test_nothing_asked_is_no_verdict() -> None:
    assert verdict_of({"base": [], "sft": []}, {}, seed=0) is None
    assert verdict_of({"base": [{}], "sft": [{}]}, {}, seed=0) is None


@pytest.mark.parametrize(
    ("metric", "low", "high", "direction"),
    [
        ("check/x", 0.1, 0.3, 1), ("check/x", -0.3, -0.1, -1), ("check/x", -0.1, 0.3, 0), ("check/x", 0.0, 0.3, 0),
        ("perplexity", 0.1, 0.3, -1), ("perplexity", -0.3, -0.1, 1), ("length_mean", 5, 9, 0),
        ("preference_margin", 0.1, 0.3, 0),
    ],
)  # fmt: skip
def test_which_side_is_better(metric: str, low: float, high: float, direction: int) -> None:
    assert better(metric, Estimate((low + high) / 2, low, high, 9)) == direction


def test_gains_and_losses_in_either_direction() -> None:
    up, down = Estimate(0.2, 0.1, 0.3, 9), Estimate(-0.2, -0.3, -0.1, 9)
    checks = {"base": rows(0, 0), "sft": rows(2, 2), "dpo": rows(1, 1)}
    # dpo less sft, while sft is the best: what dpo gains, sft loses.
    differences = {"dpo": {"sft": {"check/0": down, "perplexity": down}}, "sft": {"base": {"check/1": up}}}
    verdict = verdict_of(checks, differences, seed=0)
    assert verdict is not None
    assert verdict.best == "sft"
    assert verdict.gains == {"base": ["check/1"], "dpo": ["check/0"]}
    assert verdict.losses == {"base": [], "dpo": ["perplexity"]}
