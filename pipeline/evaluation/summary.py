"""From what each model did, row by row, to figures with intervals and differences to the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.generation import Answer
from pipeline.evaluation.intervals import Estimate, mean, proportion, proportion_difference, ratio
from pipeline.evaluation.preference import perplexity, perplexity_difference
from pipeline.evaluation.repetition import repetition

_NOT_FINITE = "not finite: log-probabilities of the model or of its reference overflow or are undefined"


@dataclass(frozen=True)
class General:
    """The regression set, row by row."""

    logps: Sequence[float]
    """Of each reference answer, in nats."""
    tokens: Sequence[int]
    """How many tokens each has."""
    agreed: Sequence[int] | None = None
    """At how many of them the most likely token is the base's; None for the base itself."""


@dataclass(frozen=True)
class Measured:
    """What one model did, row by row. Every model is asked the same rows in the same order."""

    answers: Sequence[Answer]
    checks: Sequence[Mapping[str, bool]]
    """For each answer."""
    logps: Sequence[float]
    """Of each held-out completion, in nats."""
    tokens: Sequence[int]
    """How many tokens of each completion were scored."""
    margins: Sequence[float] | None
    """The reward margin of each held-out pair; None without a reference."""
    kl: Sequence[float] = ()
    """The divergence from the reference over the first so many completions, in nats each; empty without one."""
    general: General | None = None
    """What it made of the regression set."""

    @property
    def lengths(self) -> list[float]:
        """The tokens of each answer."""
        return [float(answer.tokens) for answer in self.answers]

    @property
    def repetitions(self) -> list[float]:
        """Of each answer."""
        return [repetition(answer.text) for answer in self.answers]

    @property
    def outcomes(self) -> dict[str, list[bool]]:
        """The rows of each share. A NaN margin would pass for a lost pair, so then there are no pairs."""
        outcomes: dict[str, list[bool]] = {}
        for checks in self.checks:
            for name, holds in checks.items():
                outcomes.setdefault(name, []).append(holds)
        if self.margins and all(map(math.isfinite, self.margins)):
            outcomes["preference_accuracy"] = [margin > 0 for margin in self.margins]
        return outcomes


def figures(measured: Measured, *, seed: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Every metric that applies, by its name in `compare.json`, and for each that came out infinite or
    undefined why.

    A metric of no rows does not apply.
    """
    estimates = {name: proportion(outcomes) for name, outcomes in measured.outcomes.items()}
    if measured.margins:
        estimates["preference_margin"] = mean(measured.margins, seed=seed)
    if measured.logps:
        estimates["perplexity"] = perplexity(measured.logps, measured.tokens, seed=seed)
    if measured.answers:
        estimates["length_mean"] = mean(measured.lengths, seed=seed)
        estimates["repetition"] = mean(measured.repetitions, seed=seed)
    if measured.kl:
        estimates["kl_to_reference"] = ratio(measured.kl, measured.tokens[: len(measured.kl)], seed=seed)
    general = measured.general
    if general is not None:
        estimates["regression_perplexity"] = perplexity(general.logps, general.tokens, seed=seed)
        if general.agreed is not None:
            estimates["regression_agreement"] = ratio(general.agreed, general.tokens, seed=seed)
    absent = {name: _NOT_FINITE for name, estimate in estimates.items() if not estimate.finite}
    if "preference_margin" in absent:
        absent["preference_accuracy"] = _NOT_FINITE
    return _finite(estimates), absent


def differences(measured: Measured, base: Measured, *, seed: int) -> dict[str, Estimate]:
    """Every metric that both have, less the base's, paired by row; one that is not finite is left out."""
    base_outcomes = base.outcomes
    estimates = {
        name: proportion_difference(outcomes, base_outcomes[name])
        for name, outcomes in measured.outcomes.items()
        if name in base_outcomes
    }
    if measured.margins and base.margins:
        estimates["preference_margin"] = mean(_less(measured.margins, base.margins), seed=seed)
    if measured.logps and base.logps:
        estimates["perplexity"] = perplexity_difference(measured.logps, base.logps, measured.tokens, seed=seed)
    if measured.answers and base.answers:
        estimates["length_mean"] = mean(_less(measured.lengths, base.lengths), seed=seed)
        estimates["repetition"] = mean(_less(measured.repetitions, base.repetitions), seed=seed)
    if measured.general and base.general:
        ours, theirs = measured.general, base.general
        estimates["regression_perplexity"] = perplexity_difference(ours.logps, theirs.logps, ours.tokens, seed=seed)
    return _finite(estimates)


def _less(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, base, strict=True)]


def _finite(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {name: estimate for name, estimate in estimates.items() if estimate.finite}
