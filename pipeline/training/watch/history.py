"""What a run has recorded so far, as the rules of `health` read it: logged steps, evaluations, pairs, samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REPEATED_RUN = 20
"""Characters: a run of so many that stood before in the same text is a repetition. Characters and not words, since
not every language parts its words."""


@dataclass(frozen=True)
class Setting:
    """What the rules need to know of the run besides its figures."""

    stage: str
    """`sft` or `dpo`."""
    learning_rate: float
    """The adapter's peak."""
    max_steps: int = 0
    """Optimizer steps of the whole run."""
    pairs_per_step: int = 1
    """Rows of one optimizer step, over all devices."""
    beta: float = 0.1
    """DPO's."""
    loss_scaling: bool = False
    """In float16 a gradient overflows now and then, by design: the scale is halved and the step left out."""


@dataclass(frozen=True)
class Pairs:
    """One evaluation, pair by pair; all lists are in the order of the held-out file."""

    step: int
    chosen_rewards: Sequence[float]
    """β log(π/π_ref) of the chosen completion: TRL's `rewards/chosen` before the mean."""
    rejected_rewards: Sequence[float]
    chosen_tokens: Sequence[int]
    """Completion tokens that are scored."""
    rejected_tokens: Sequence[int]

    @property
    def margins(self) -> list[float]:
        """How much more reward the chosen completion has."""
        return [chosen - rejected for chosen, rejected in zip(self.chosen_rewards, self.rejected_rewards, strict=True)]


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, answered greedily during an evaluation."""

    prompt: str
    answer: str
    tokens: int
    ended: bool
    """Whether it ended by itself."""

    @property
    def repetition(self) -> float:
        """See `repetition`."""
        return repetition(self.answer)


@dataclass
class History:
    """Everything recorded, oldest first."""

    setting: Setting
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Logged training steps: records with `loss`."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Records with `eval_loss`."""
    pairs: Pairs | None = None
    """The newest evaluation's."""
    samples: list[tuple[int, Sequence[Sample]]] = field(default_factory=list)
    """Step and samples of each evaluation."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes one record of `metrics.jsonl`."""
        if "loss" in record:
            self.steps.append(dict(record))
        elif "eval_loss" in record:
            self.evaluations.append(dict(record))


def repetition(text: str) -> float:
    """The share of runs of `REPEATED_RUN` characters that stood before in the text; 0 where it is too short."""
    runs = [text[at : at + REPEATED_RUN] for at in range(len(text) - REPEATED_RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values share the mean of theirs."""
    order = sorted(values)
    first = {value: at for at, value in reversed(list(enumerate(order, start=1)))}
    count = Counter(values)
    return [first[value] + (count[value] - 1) / 2 for value in values]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)
