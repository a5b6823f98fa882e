"""Which version should survive: the one that passes most checks, and how sure that is.

A version's score is the mean over prompts of the share of checks that its answer passes: every check counts the same.
Differences are paired by prompt. Figures that have a better side and differ beyond chance are named beside it, so that
a version that wins on checks and has forgotten its English does not win in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.intervals import Estimate, mean

LOWER_IS_BETTER = frozenset({"perplexity", "repetition", "regression_perplexity"})
NO_BETTER_SIDE = frozenset(
    {"length_mean", "kl_to_reference", "preference_margin", "preference_accuracy", "regression_agreement"}
)
"""Longer is not better, and the reward's figures of two stages are against two references."""
STATED_BY_NOBODY = "ends_by_itself"
"""The one check that every comparison makes without being asked."""

Differences = Mapping[str, Mapping[str, Mapping[str, Estimate]]]
"""By model, then by the model it is compared to, then by metric: the first less the second."""


@dataclass(frozen=True)
class Verdict:
    """The best version and what speaks for and against it."""

    best: str
    decided: bool
    """Whether it beats every other version beyond chance."""
    stated: bool
    """Whether the experiment states any check at all."""
    scores: dict[str, Estimate]
    """The share of checks passed, by model."""
    leads: dict[str, Estimate]
    """The best version's score less that of each other."""
    gains: dict[str, list[str]]
    """Metrics on which the best version is better beyond chance, by the model that it is better than."""
    losses: dict[str, list[str]]
    """The same where it is worse."""

    @property
    def sentence(self) -> str:
        """The verdict in a sentence or two."""
        score = self.scores[self.best]
        passes = f"passes {100 * score.value:.0f} % of the checks {_interval(score)}"
        leads = ", ".join(
            f"{100 * lead.value:+.0f} points {_interval(lead, '+')} against {name}" for name, lead in self.leads.items()
        )
        if not self.leads:
            text = f"{self.best} {passes}; there is no other version to compare it to."
        elif self.decided:
            text = f"{self.best} should survive: it {passes}, {leads}."
        else:
            even = [name for name, lead in self.leads.items() if lead.low <= 0]
            text = f"No version is better beyond chance: {self.best} {passes}, {leads}; not more than chance against "
            text += f"{' and '.join(even)}."
        if not self.stated:
            text += " The experiment states no checks, so this counts only whether answers end by themselves."
        return text

    def as_dict(self) -> dict[str, Any]:
        """The verdict as `compare.json` holds it."""
        return {
            "best": self.best,
            "decided": self.decided,
            "stated": self.stated,
            "sentence": self.sentence,
            "scores": {name: estimate.as_dict() for name, estimate in self.scores.items()},
            "leads": {name: estimate.as_dict() for name, estimate in self.leads.items()},
            "gains": self.gains,
            "losses": self.losses,
        }


def verdict_of(
    checks: Mapping[str, Sequence[Mapping[str, bool]]], differences: Differences, *, seed: int
) -> Verdict | None:
    """The verdict over several models; None where no prompt was asked.

    Args:
        checks: by model, what each prompt's answer passed; the same prompts in the same order.
        differences: see there; either direction will do.
        seed: of the bootstrap intervals.
    """
    shares = {
        name: [sum(outcomes.values()) / len(outcomes) for outcomes in rows if outcomes] for name, rows in checks.items()
    }
    if not shares or not all(shares.values()):
        return None
    scores = {name: mean(rows, seed=seed) for name, rows in shares.items()}
    # Of equal ones the first: the base before SFT, SFT before DPO.
    best = max(scores, key=lambda name: scores[name].value)
    leads = {
        name: mean([ours - theirs for ours, theirs in zip(shares[best], rows, strict=True)], seed=seed)
        for name, rows in shares.items()
        if name != best
    }
    gains, losses = {}, {}
    for name in leads:
        found = {metric: _direction(differences, best, name, metric) for metric in _metrics(differences, best, name)}
        gains[name] = [metric for metric, direction in found.items() if direction > 0]
        losses[name] = [metric for metric, direction in found.items() if direction < 0]
    stated = any(set(outcomes) - {STATED_BY_NOBODY} for rows in checks.values() for outcomes in rows)
    decided = bool(leads) and all(lead.low > 0 for lead in leads.values())
    return Verdict(best, decided, stated, scores, leads, gains, losses)


def better(metric: str, difference: Estimate) -> int:
    """1 where `difference` is for the better beyond chance, -1 for the worse, 0 where it is neither."""
    if metric in NO_BETTER_SIDE or difference.low <= 0 <= difference.high:
        return 0
    return 1 if (difference.value > 0) is (metric not in LOWER_IS_BETTER) else -1


def _metrics(differences: Differences, one: str, other: str) -> list[str]:
    return list(differences.get(one, {}).get(other, {}) or differences.get(other, {}).get(one, {}))


def _direction(differences: Differences, one: str, other: str, metric: str) -> int:
    difference = differences.get(one, {}).get(other, {}).get(metric)
    if difference is not None:
        return better(metric, difference)
    return -better(metric, differences[other][one][metric])


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"[{100 * estimate.low:{sign}.0f}, {100 * estimate.high:{sign}.0f}]"
