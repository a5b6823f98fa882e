"""Each rule on records that break it and on records that do not; every figure is worked out in its test."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from pipeline.training.watch.health import RULES, Finding, examine
from pipeline.training.watch.history import History, Pairs, Sample, Setting, ranks, repetition

QUICKSTART = Path(__file__).parent / "quickstart"
"""Metrics of the quickstart's two runs (2026-11-22, recipes/triage.yaml), and its held-out pairs at the end."""
PAGE = Path(__file__).parents[3] / "docs" / "health.md"
DPO = Setting("dpo", learning_rate=1e-4, max_steps=100, pairs_per_step=4, beta=0.1)
SFT = Setting("sft", learning_rate=1e-4, max_steps=100)


def step(at: int, **figures: Any) -> dict[str, Any]:
    return {"step": at, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, **figures}


def history(setting: Setting, *records: dict[str, Any]) -> History:
    made = History(setting)
    for record in records:
        made.add(record)
    return made


def found(made: History) -> dict[str, Finding]:
    return {finding.code: finding for finding in examine(made)}


def replayed(setting: Setting, records: list[dict[str, Any]]) -> dict[str, Finding]:
    """Everything that is found while the records come in one by one, as they do in a run."""
    made, seen = History(setting), {}
    for record in records:
        made.add(record)
        seen |= {finding.code: finding for finding in examine(made, seen)}
    return seen


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_not_finite(name: str) -> None:
    finding = found(history(SFT, step(1), step(2, **{name: None})))["not-finite"]
    assert (finding.step, finding.figure, finding.message) == (2, None, f"{name} is not finite")


def test_not_finite_evaluation() -> None:
    assert found(history(SFT, {"step": 3, "eval_loss": None}))["not-finite"].step == 3


def test_an_overflow_under_loss_scaling_is_no_finding() -> None:
    assert found(history(replace(SFT, loss_scaling=True), step(1, grad_norm=None))) == {}


def test_chosen_below_the_reference_in_training() -> None:
    """Ten lines of -0.11 are 1.1 nats at beta 0.1; nine are not judged, and -0.09 is 0.9 nats."""

    def falling(reward: float, lines: int) -> History:
        return history(DPO, *(step(at, **{"rewards/chosen": reward}) for at in range(1, lines + 1)))

    finding = found(falling(-0.11, 10))["likelihood-displacement"]
    assert finding.figure == pytest.approx(-1.1)
    assert "-1.10 nats" in finding.message
    assert found(falling(-0.11, 9)) == {}
    assert found(falling(-0.09, 10)) == {}


def test_chosen_below_the_reference_on_held_out_pairs() -> None:
    def evaluated(reward: float) -> History:
        return history(DPO, {"step": 8, "eval_loss": 0.6, "eval_rewards/chosen": reward})

    finding = found(evaluated(-0.25))["likelihood-displacement"]
    assert (finding.step, finding.figure) == (8, pytest.approx(-2.5))
    assert found(evaluated(-0.05)) == {}


def told_apart(setting: Setting, since: int, steps: int, margin: float, **figures: Any) -> dict[str, Finding]:
    """A run whose pairs are in no order before the step `since`, and all told apart by `margin` from there on."""
    records = [
        step(
            at,
            **{"rewards/accuracies": 1.0 if at >= since else 0.5, "rewards/margins": margin if at >= since else 0.0},
            **figures,
        )
        for at in range(1, steps + 1)
    ]
    return replayed(setting, records)


def test_accuracy_saturated() -> None:
    """Four pairs a step: 64 pairs are 16 steps, here 3 to 18 of 100, at a margin of at least ln 9 = 2.197."""
    finding = told_apart(DPO, 3, 18, 2.2)["accuracy-saturated"]
    assert (finding.step, finding.figure) == (18, pytest.approx(2.2))
    assert "at step 18 of 100 the last 64 training pairs were all told apart, by a margin of 2.20" in finding.message
    assert told_apart(DPO, 3, 17, 2.2) == {}  # 60 pairs


def test_accuracy_at_a_small_margin_is_a_run_that_learns_what_it_should() -> None:
    """One wanted difference puts all pairs in order at once; the margin is what says that nothing is left of it."""
    assert told_apart(DPO, 2, 100, 2.19) == {}
    quickstart = Setting("dpo", learning_rate=4e-5, max_steps=20, pairs_per_step=8, beta=0.1)
    assert told_apart(quickstart, 7, 20, 0.4) == {}  # 64 in a row at step 14


def test_accuracy_that_saturates_late_is_learning() -> None:
    """A quarter of 100 steps is 25, and 128 pairs are 32: step 32 is the last one that is judged."""
    assert "accuracy-saturated" in told_apart(DPO, 17, 100, 3.0)
    assert told_apart(DPO, 18, 100, 3.0) == {}
    longer = replace(DPO, max_steps=400)
    assert "accuracy-saturated" in told_apart(longer, 85, 400, 3.0)
    assert told_apart(longer, 86, 400, 3.0) == {}
    assert told_apart(longer, 3, 100, 3.0, epoch=1.25) == {}  # the pairs were seen before


def test_one_pair_that_is_not_told_apart_begins_the_count_anew() -> None:
    """Of the first 32 steps, which are judged, 16 in a row are left behind one slip at step 10, but not behind two."""

    def run(*slips: int) -> dict[str, Finding]:
        accuracies = {at: 0.75 if at in slips else 1.0 for at in range(1, 40)}
        right = [step(at, **{"rewards/accuracies": one, "rewards/margins": 3.0}) for at, one in accuracies.items()]
        return replayed(DPO, right)

    assert run(10)["accuracy-saturated"].step == 26
    assert run(10, 20) == {}


def test_pairs_are_counted_where_only_some_steps_are_logged() -> None:
    """Every fourth step of four pairs: four lines are 64 pairs."""
    records = [step(at, **{"rewards/accuracies": 1.0, "rewards/margins": 3.0}) for at in (4, 8, 12, 16)]
    assert replayed(DPO, records[:3]) == {}
    assert replayed(DPO, records)["accuracy-saturated"].step == 16


def pairs(margins: list[float], longer: list[int]) -> Pairs:
    """Chosen answers of 50 tokens that gained nothing, and rejected ones that lost the margin."""
    return Pairs(4, [0.0] * len(margins), [-m for m in margins], [50] * len(margins), [50 - more for more in longer])


def with_pairs(some: Pairs) -> History:
    made = History(DPO)
    made.pairs = some
    return made


def test_margin_that_follows_the_length() -> None:
    margins = [0.1 + 0.01 * at for at in range(20)]
    finding = found(with_pairs(pairs(margins, list(range(20)))))["length-margin"]
    assert (finding.step, finding.figure) == (4, pytest.approx(1.0))
    shorter = found(with_pairs(pairs(margins, list(range(19, -1, -1)))))["length-margin"]
    assert shorter.figure == pytest.approx(-1.0)


def test_margin_that_does_not_follow_the_length() -> None:
    """Alternating margins: the rank correlation with an even ramp of lengths is near 0."""
    ramp = list(range(20))
    assert found(with_pairs(pairs([0.1, 0.3] * 10, ramp))) == {}
    assert found(with_pairs(pairs([0.1] * 20, ramp))) == {}  # all equal: no correlation at all
    assert found(with_pairs(pairs([0.1 + 0.01 * at for at in ramp[:15]], ramp[:15]))) == {}  # too few to tell
    assert found(with_pairs(pairs([-0.5 + 0.01 * at for at in ramp], ramp))) == {}  # nothing was gained


def test_ranks_are_those_of_scipy() -> None:
    values, others = [3.0, 1.0, 3.0, 2.0, 3.0, 0.5], [1.0, 1.0, 2.0, 5.0, 4.0, 0.0]
    assert ranks(values) == [5, 2, 5, 3, 5, 1]
    from statistics import correlation

    assert correlation(ranks(values), ranks(others)) == pytest.approx(spearmanr(values, others).statistic)


def test_loss_stuck() -> None:
    """A quarter of 100 steps is 25: warm-up ends at step 5, so that 29 is the first that may be judged."""

    def run(loss: float) -> dict[str, Finding]:
        rates = [1e-4 * min(1, 0.01 if at < 5 else 1) for at in range(1, 41)]
        records = [
            step(at, loss=loss, learning_rate=rate, **{"rewards/margins": 0.0}) for at, rate in enumerate(rates, 1)
        ]
        return replayed(DPO, records)

    finding = run(0.692)["loss-stuck"]
    assert (finding.step, finding.figure) == (29, pytest.approx(0.692))
    assert run(math.log(2) - 0.006) == {}


def test_a_loss_of_sft_near_ln_2_is_a_loss_like_any_other() -> None:
    assert replayed(SFT, [step(at, loss=math.log(2)) for at in range(1, 100)]) == {}


def test_gradient_spike() -> None:
    """The median of the norms before is 1: 10.5 is a spike, 9.5 is none, and of fewer than ten lines none is judged."""

    def run(spike: float, before: int = 12) -> dict[str, Finding]:
        norms = [*([0.9, 1.0, 1.1] * 4)[:before], spike]
        return replayed(SFT, [step(at, grad_norm=norm) for at, norm in enumerate(norms, start=1)])

    finding = run(10.5)["gradient-spike"]
    assert (finding.step, finding.figure) == (13, 10.5)
    assert run(9.5) == {}
    assert run(10.5, before=9) == {}


def overfitted(evaluations: list[float], losses: list[float]) -> dict[str, Finding]:
    """Evaluations at 0, 10, 20, …, and a training loss for each stretch between."""
    records = [{"step": 0, "eval_loss": evaluations[0]}]
    for at, (evaluation, loss) in enumerate(zip(evaluations[1:], losses, strict=True)):
        records += [step(10 * at + inside, loss=loss) for inside in range(1, 11)]
        records.append({"step": 10 * at + 10, "eval_loss": evaluation})
    return replayed(SFT, records)


def test_overfitting() -> None:
    finding = overfitted([2.0, 1.0, 1.06], [1.5, 0.8])["overfitting"]
    assert (finding.step, finding.figure) == (20, 1.06)
    assert overfitted([2.0, 1.0, 1.04], [1.5, 0.8]) == {}  # 4 % is noise
    assert overfitted([2.0, 1.0, 1.2], [0.8, 1.5]) == {}  # both rise: diverging, not overfitting
    assert overfitted([2.0, 1.0, 0.9], [1.5, 0.8]) == {}
    assert overfitted([0.02, 0.01, 0.015], [0.02, 0.01]) == {}  # half of nothing


def test_overfitting_from_the_first_step() -> None:
    falling = [step(at, loss=1 - at / 20) for at in range(1, 11)]
    records = [{"step": 0, "eval_loss": 0.5}, *falling, {"step": 10, "eval_loss": 0.6}]
    assert "overfitting" in replayed(SFT, records)


def samples(*evaluations: list[tuple[str, bool]]) -> History:
    made = History(DPO)
    made.samples = [
        (10 * at, [Sample("?", answer, len(answer), ended) for answer, ended in answers])
        for at, answers in enumerate(evaluations)
    ]
    return made


def test_answers_that_no_longer_stop() -> None:
    stops, runs_on = ("yes", True), ("yes and", False)
    finding = found(samples([stops, stops, stops, runs_on], [stops, runs_on, runs_on, runs_on]))["does-not-stop"]
    assert (finding.step, finding.figure) == (10, 0.75)
    assert found(samples([stops] * 4, [stops, stops, stops, runs_on])) == {}
    assert found(samples([runs_on] * 4, [runs_on] * 4)) == {}  # it never did: training has not made it worse
    assert found(samples([runs_on] * 4, [stops] * 4)) == {}


def test_answers_that_repeat() -> None:
    plain, circles = ("The printer on the second floor is out of paper.", True), ("out of paper, " * 12, True)
    assert found(samples([plain, plain], [circles, plain]))["repeats"].figure == 0.5
    assert found(samples([circles, circles], [circles, circles])) == {}


def test_repetition() -> None:
    """Runs of 20 characters: 26 letters have 7, all new; written twice, of 33 runs the last 7 stood before."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert repetition(letters) == 0
    assert repetition(letters * 2) == pytest.approx(7 / 33)
    assert repetition("short") == 0
    assert repetition("ha" * 40) == pytest.approx(1 - 2 / 61)


def test_kl_beyond_the_bound() -> None:
    """Rejected answers of 50 tokens lost 3 in reward: 30 nats at beta 0.1, 0.6 nats a token."""
    lost = found(with_pairs(pairs([3.0] * 4, [0] * 4)))["kl-bound"]
    assert lost.figure == pytest.approx(0.6)
    assert "rejected answers lost 0.60 nats a token" in lost.message
    gained = Pairs(4, [3.0] * 4, [0.0] * 4, [50] * 4, [50] * 4)
    assert "chosen answers gained 0.60" in found(with_pairs(gained))["kl-bound"].message
    assert found(with_pairs(pairs([2.4] * 4, [0] * 4))) == {}


def test_a_finding_is_told_once() -> None:
    made = history(SFT, step(1, loss=None))
    assert [finding.code for finding in examine(made)] == ["not-finite"]
    assert examine(made, {"not-finite"}) == []


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("sft", Setting("sft", learning_rate=8e-4, max_steps=100, pairs_per_step=4)),
        ("dpo", Setting("dpo", learning_rate=4e-5, max_steps=20, pairs_per_step=8, beta=0.1)),
    ],
)
def test_the_healthy_quickstart_has_no_finding(stage: str, setting: Setting) -> None:
    lines = (QUICKSTART / f"{stage}.jsonl").read_text().splitlines()
    assert replayed(setting, [json.loads(line) for line in lines]) == {}


def test_the_quickstarts_pairs_have_no_finding() -> None:
    """Rejected answers carry a phrase more, so margins go with length; within the bounds."""
    record = json.loads((QUICKSTART / "pairs.jsonl").read_text())
    columns = (record[name] for name in ("rewards/chosen", "rewards/rejected", "tokens/chosen", "tokens/rejected"))
    assert found(with_pairs(Pairs(record["step"], *columns))) == {}


def test_the_page_describes_every_rule_as_it_is() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    sections = [line.removeprefix("### ") for line in PAGE.read_text(encoding="utf-8").splitlines() if "### " in line]
    assert sections == [rule.code for rule in RULES]
    for rule in RULES:
        assert f"### {rule.code} {rule.watched} Mend: {rule.mend}." in page, rule.code
