"""What goes wrong in a run that looks healthy, found from its own figures while it trains.

Each rule is a function of the run's `History`, which looks at its newest records and gives the figure that broke the
bound, or nothing. A finding is told once, when it is first seen. It never stops a run: not-finite figures, which do,
are the guard's to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import StatisticsError, correlation, median
from typing import Any

from pipeline.training.watch.history import REPEATED_RUN, History, Sample, mean, ranks

WINDOW = 10
"""Logged steps that a noisy training figure is averaged over."""
DISPLACED_NATS = 1.0
"""How far the mean chosen log-probability may fall: at one nat an answer is e times less likely than before."""
EARLY_SHARE = 0.25
EARLY_PAIRS = 128
"""Early is the first quarter of the steps, or these first pairs where that is fewer: in a run as short as the
quickstart's a quarter shows nothing yet. What is told apart later has been learnt, or seen before."""
SATURATED_PAIRS = 64
"""Pairs in a row told apart. Where one in twenty is hard, 64 in a row are all right in 4 % of runs only."""
SATURATED_MARGIN = math.log(9)
"""A pair pulls with the weight sigmoid(-margin) (Rafailov et al. 2023, section 4): 0.5 at the start, 0.1 from here on.
Accuracy alone says nothing of the kind: one step along any feature that all pairs share puts them all in order, and the
feature may be the very one that is to be learnt."""
LENGTH_CORRELATION = 0.75
"""Of ranks, so that a few pairs of very different length do not decide. From here on the difference in length explains
more than half of the margin's order (0.75² = 0.56)."""
FEWEST_PAIRS = 16
"""With fewer a correlation of 0.75 comes by chance (at 16 pairs one of 0.62 does once in a hundred times)."""
STUCK_LOSS = 0.005
"""How near to ln 2 the mean loss is stuck: the loss falls by half the margin, so the mean margin is below 0.01."""
STUCK_STEPS = 10
STUCK_SHARE = 0.25
"""Of the run's steps, so that a long run with a low learning rate is given its time."""
WARM = 0.1
"""Of the peak learning rate: steps below are warm-up or the schedule's end, in which nothing should move."""
SPIKE = 10.0
"""Times the median gradient norm; within a run it varies by a factor of two or three."""
RISE = 0.05
"""Of the lowest evaluation loss. Less is noise of a few hundred held-out rows."""
RISE_NATS = 0.01
"""And at least so much: near 0 a loss doubles without meaning."""
SAMPLES_WORSE = 0.5
"""Share of the samples: with few prompts, less than half can be chance."""
REPETITIVE = 0.5
"""A text that says more than half of its runs again goes round in circles."""
KL_NATS = 0.5
"""Nats a token: at half a nat every token is 1.6 times less likely on average. The task's healthy runs stay below
0.05, and lose their JSON at ten times as much."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, as it is told and as the manifest keeps it."""

    code: str
    step: int
    figure: float | None
    """None where the figure is not a number."""
    message: str
    """With the figure and the bound."""
    mend: str

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a rule gives: step, figure and message."""

    step: int
    figure: float | None
    message: str


@dataclass(frozen=True)
class Rule:
    """One thing that is watched."""

    code: str
    watched: str
    """When it is told, for the documentation."""
    mend: str
    """What usually helps."""
    find: Callable[[History], Seen | None]


def _not_finite(history: History) -> Seen | None:
    names = ("loss", "eval_loss") if history.setting.loss_scaling else ("loss", "eval_loss", "grad_norm")
    for record in (*history.steps[-1:], *history.evaluations[-1:]):
        for name in names:
            if name in record and record[name] is None:
                return Seen(record["step"], None, f"{name} is not finite")
    return None


def _displacement(history: History) -> Seen | None:
    """Chosen log-probability below the reference, on held-out pairs or over the last logged steps.

    Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization".
    """
    beta = history.setting.beta
    figures = [
        (where[-1]["step"], mean([record[name] for record in where]) / beta, what)
        for where, name, what in (
            (history.evaluations[-1:], "eval_rewards/chosen", "held-out pairs"),
            (history.steps[-WINDOW:] if len(history.steps) >= WINDOW else [], "rewards/chosen", f"{WINDOW} log lines"),
        )
        if where and all(isinstance(record.get(name), float) for record in where)
    ]
    for step, nats, what in figures:
        if nats <= -DISPLACED_NATS:
            return Seen(
                step,
                nats,
                f"chosen answers have become less likely than under the reference: {nats:.2f} nats an answer, mean "
                f"of {what} (bound -{DISPLACED_NATS:g})",
            )
    return None


def _saturated(history: History) -> Seen | None:
    """Many pairs in a row told apart by a margin that leaves nothing to learn, while the run has barely begun."""
    setting, steps = history.setting, history.steps
    early = max(EARLY_SHARE * setting.max_steps, EARLY_PAIRS / setting.pairs_per_step)
    if not steps or steps[-1]["step"] > early or steps[-1].get("epoch", 0) > 1:
        return None
    pairs, margins = 0, 0.0
    for before, record in reversed(list(pairwise([{"step": 0}, *steps]))):
        margin = record.get("rewards/margins")
        if margin is None or record.get("rewards/accuracies") != 1:
            return None
        logged = (record["step"] - before["step"]) * setting.pairs_per_step
        pairs, margins = pairs + logged, margins + logged * margin
        if pairs >= SATURATED_PAIRS:
            break
    if pairs < SATURATED_PAIRS or margins / pairs < SATURATED_MARGIN:
        return None
    return Seen(
        steps[-1]["step"],
        margins / pairs,
        f"at step {steps[-1]['step']} of {setting.max_steps} the last {pairs} training pairs were all told apart, by a "
        f"margin of {margins / pairs:.2f} on average (bound {SATURATED_MARGIN:.2f}): so soon, something easy marks the "
        "rejected answers",
    )


def _length(history: History) -> Seen | None:
    """The margin follows the difference in length, longer or shorter: Spearman's rank correlation over the pairs."""
    newest = history.pairs
    if newest is None or len(newest.margins) < FEWEST_PAIRS or mean(newest.margins) <= 0:
        return None
    longer = [chosen - rejected for chosen, rejected in zip(newest.chosen_tokens, newest.rejected_tokens, strict=True)]
    try:
        related = correlation(ranks(longer), ranks(newest.margins))
    except StatisticsError:  # all differ by one length, or all margins are equal
        return None
    if abs(related) < LENGTH_CORRELATION:
        return None
    return Seen(
        newest.step,
        related,
        f"the margin follows the length: over {len(longer)} held-out pairs its rank correlation with the difference in "
        f"tokens is {related:.2f} (bound {LENGTH_CORRELATION:g} either way); the mean margin is "
        f"{mean(newest.margins):.3f}",
    )


def _stuck(history: History) -> Seen | None:
    """The loss still reads ln 2 when a good part of the run is over, at a learning rate that should move it."""
    setting = history.setting
    needed = max(STUCK_STEPS, math.ceil(STUCK_SHARE * setting.max_steps))
    newest = history.steps[-1] if history.steps else None
    if newest is None or "rewards/margins" not in newest or newest["step"] < needed or not _near_ln_2(newest["loss"]):
        return None
    window = []
    for record in reversed(history.steps):
        if record["step"] <= newest["step"] - needed:
            break
        window.append(record)
    if any(record["loss"] is None or record["learning_rate"] < WARM * setting.learning_rate for record in window):
        return None
    loss = mean([record["loss"] for record in window])
    if abs(loss - math.log(2)) > STUCK_LOSS:
        return None
    return Seen(
        newest["step"],
        loss,
        f"the loss is stuck at ln 2 = {math.log(2):.4f}: it reads {loss:.4f} on average over the last {needed} of "
        f"{newest['step']} steps",
    )


def _near_ln_2(loss: float | None) -> bool:
    return loss is not None and abs(loss - math.log(2)) <= 10 * STUCK_LOSS


def _spike(history: History) -> Seen | None:
    """One gradient many times larger than those before it."""
    norms = [record.get("grad_norm") for record in history.steps[-2 * WINDOW - 1 :]]
    known = [norm for norm in norms[:-1] if norm is not None]
    if len(known) < WINDOW or norms[-1] is None or norms[-1] <= SPIKE * median(known):
        return None
    return Seen(
        history.steps[-1]["step"],
        norms[-1],
        f"the gradient norm jumped to {norms[-1]:.3g}, {norms[-1] / median(known):.0f} times the median of the "
        f"{len(known)} log lines before (bound {SPIKE:g} times)",
    )


def _overfitting(history: History) -> Seen | None:
    """The evaluation loss has risen from its lowest while the training loss went on falling."""
    known = [record for record in history.evaluations if record["eval_loss"] is not None]
    if len(known) < 2:
        return None
    newest, best = known[-1], min(known[:-1], key=lambda record: float(record["eval_loss"]))
    rise = newest["eval_loss"] - best["eval_loss"]
    if rise <= max(RISE * best["eval_loss"], RISE_NATS):
        return None
    since: list[float] = []
    before: list[float] = []
    for record in history.steps:
        if record["loss"] is not None and record["step"] <= newest["step"]:
            (since if record["step"] > best["step"] else before).append(record["loss"])
    if not before:  # the lowest was at the start
        before, since = since[: len(since) // 2], since[len(since) // 2 :]
    before = before[-len(since) :]
    if not before or not since or mean(since) >= mean(before):
        return None
    return Seen(
        newest["step"],
        newest["eval_loss"],
        f"the evaluation loss has risen from {best['eval_loss']:.4f} at step {best['step']} to "
        f"{newest['eval_loss']:.4f}, while the training loss fell from {mean(before):.4f} to {mean(since):.4f}",
    )


def _does_not_stop(history: History) -> Seen | None:
    return _worse_samples(
        history, lambda sample: not sample.ended, "of the sampled answers no longer end by themselves"
    )


def _repeats(history: History) -> Seen | None:
    return _worse_samples(
        history, lambda sample: sample.repetition > REPETITIVE, "of the sampled answers go round in circles"
    )


def _worse_samples(history: History, bad: Callable[[Sample], bool], what: str) -> Seen | None:
    """The share of bad samples has risen by half since the best evaluation so far."""

    def share(samples: Sequence[Sample]) -> float:
        return mean([float(bad(sample)) for sample in samples])

    if len(history.samples) < 2:
        return None
    (step, newest), earlier = history.samples[-1], history.samples[:-1]
    before = min(share(samples) for _, samples in earlier)
    if share(newest) - before < SAMPLES_WORSE:
        return None
    return Seen(step, share(newest), f"{share(newest):.0%} {what}; it was {before:.0%} at best before")


def _kl(history: History) -> Seen | None:
    """How far the policy is from the reference, on completions that stand for their samples.

    log π/π_ref averaged over samples of π is the unbiased estimate k1 of KL(π, π_ref), and its negative over samples
    of π_ref that of KL(π_ref, π) (Schulman 2020, "Approximating KL divergence"). Nothing is sampled here: held-out
    chosen completions stand for what the policy writes, rejected ones for what the reference writes. The larger of
    the two, in nats a completion token, is held to the bound.
    """
    newest = history.pairs
    if newest is None or not newest.chosen_rewards:
        return None
    beta = history.setting.beta
    forward = mean(newest.chosen_rewards) / beta / mean(newest.chosen_tokens)
    backward = -mean(newest.rejected_rewards) / beta / mean(newest.rejected_tokens)
    nats = max(forward, backward)
    if nats <= KL_NATS:
        return None
    which = "chosen answers gained" if forward >= backward else "rejected answers lost"
    return Seen(
        newest.step,
        nats,
        f"the policy is far from the reference: held-out {which} {nats:.2f} nats a token (an estimate of the KL "
        f"divergence; bound {KL_NATS:g})",
    )


RULES = (
    Rule(
        "not-finite",
        "Loss, gradient norm or evaluation loss is NaN or infinite. The run stops, and keeps its last checkpoint.",
        "lower the learning rate, or use `model.dtype: float32`; metrics.jsonl shows how it came",
        _not_finite,
    ),
    Rule(
        "likelihood-displacement",
        f"The mean log-probability of chosen answers is {DISPLACED_NATS:g} nat or more below the reference's, on "
        f"held-out pairs or over {WINDOW} log lines. The margin still grows, since rejected answers fall faster; what "
        "gains is neither of the two.",
        "lower the learning rate or train fewer steps, raise `beta`, or add an SFT term: `loss_type: [sigmoid, sft]`",
        _displacement,
    ),
    Rule(
        "accuracy-saturated",
        f"In the first quarter of the run, or the first {EARLY_PAIRS} pairs if that is more, and within the first "
        f"epoch, {SATURATED_PAIRS} training pairs in a row were told apart by a mean margin of {SATURATED_MARGIN:.1f}: "
        "pairs now pull with a fifth of the weight they began with. A format, a length, a phrase that only one side "
        "has is enough, and that is then all that is learnt. (Accuracy 1.0 at a small margin is none of it: pairs "
        "that differ in the one thing to be learnt are in order after a few steps.)",
        "read some pairs with `pipeline inspect`; make rejected answers as well formed as chosen ones; if the data is "
        "meant to be so, lower the learning rate",
        _saturated,
    ),
    Rule(
        "length-margin",
        f"On at least {FEWEST_PAIRS} held-out pairs the margin's rank correlation with the difference in length is "
        f"{LENGTH_CORRELATION:g} or more, either way: longer answers win for being longer, or shorter ones.",
        "balance the lengths of chosen and rejected answers, or use `loss_type: sigmoid_norm`, which divides by length",
        _length,
    ),
    Rule(
        "loss-stuck",
        f"DPO's loss is within {STUCK_LOSS:g} of ln 2 on average over a quarter of the run's steps, {STUCK_STEPS} at "
        "least, while the learning rate is up: policy and reference are still the same.",
        "raise the learning rate; check what is trainable in what the run says first",
        _stuck,
    ),
    Rule(
        "gradient-spike",
        f"A gradient norm is more than {SPIKE:g} times the median of up to {2 * WINDOW} log lines before it.",
        "look at the rows of that step for garbage; lower the learning rate or lengthen the warm-up; keep "
        "`max_grad_norm` at 1",
        _spike,
    ),
    Rule(
        "overfitting",
        f"The evaluation loss is more than {RISE:.0%} (and {RISE_NATS:g}) above its lowest, while the training loss "
        "has gone on falling.",
        "train fewer epochs or steps: the checkpoint of the lowest evaluation loss was better; or bring more data",
        _overfitting,
    ),
    Rule(
        "does-not-stop",
        f"Of the sampled answers at least {SAMPLES_WORSE:.0%} more than before run into `max_new_tokens`.",
        "lower the learning rate or train fewer steps; look whether rejected answers end where chosen ones go on",
        _does_not_stop,
    ),
    Rule(
        "repeats",
        f"Of the sampled answers at least {SAMPLES_WORSE:.0%} more than before go round in circles: more than "
        f"{REPETITIVE:.0%} of their runs of {REPEATED_RUN} characters stood before.",
        "lower the learning rate or train fewer steps; look for repetition in the data",
        _repeats,
    ),
    Rule(
        "kl-bound",
        f"The policy is more than {KL_NATS:g} nats a token from the reference. Estimated on held-out pairs: the mean "
        "log-ratio to the reference of chosen answers, or that of rejected ones negated, whichever is larger, over "
        "their mean length. (k1 of Schulman 2020, the chosen answers in the place of the policy's samples and the "
        "rejected ones in that of the reference's.)",
        "raise `beta`, lower the learning rate, or train fewer steps",
        _kl,
    ),
)
"""Everything that is watched."""


def examine(history: History, known: Container[str] = ()) -> list[Finding]:
    """What the newest records show.

    Args:
        history: of the run so far.
        known: codes that were found before, and are not looked for again.
    """
    findings = []
    for rule in RULES:
        if rule.code not in known and (seen := rule.find(history)) is not None:
            findings.append(Finding(rule.code, seen.step, seen.figure, seen.message, rule.mend))
    return findings
