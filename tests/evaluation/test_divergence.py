"""The divergence against torch's own distributions, and what fits into memory."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.data.tokens import Completion
from pipeline.evaluation import divergence
from pipeline.evaluation.divergence import Divergence, fitting
from pipeline.evaluation.repetition import repetition


def completions(*tokens: int) -> list[Completion]:
    return [Completion([1], list(range(count))) for count in tokens]


def test_it_is_the_kl_divergence_of_the_policy_from_the_reference() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 11), torch.randn(3, 11)
    reference = Divergence(completions(3), None, keep=True)
    reference.see(0, theirs)
    policy = Divergence(completions(3), reference.kept, keep=False)
    policy.see(0, ours)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=ours), torch.distributions.Categorical(logits=theirs)
    )
    assert policy.nats[0] == pytest.approx(float(expected.sum()), rel=1e-5)
    other_way = Divergence(completions(3), {0: ours.log_softmax(-1)}, keep=False)
    other_way.see(0, theirs)
    assert other_way.nats[0] != pytest.approx(policy.nats[0], rel=1e-4)  # it is not symmetric
    assert policy.kept == {}


def test_of_two_outcomes_by_hand() -> None:
    policy = Divergence(completions(1), {0: torch.tensor([[0.5, 0.5]]).log()}, keep=False)
    policy.see(0, torch.tensor([[0.75, 0.25]]).log())
    assert policy.nats[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_only_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_BYTES", 4 * 10 * 7)  # seven tokens of a vocabulary of ten
    assert fitting(completions(3, 4, 1), 10) == 2
    assert fitting(completions(9, 1), 10) == 1  # one is always kept
    assert fitting([], 10) == 0
    kept = Divergence(completions(3, 4, 1), None, keep=True)
    for at, tokens in enumerate((3, 4, 1)):
        kept.see(at, torch.zeros(tokens, 10))
    assert sorted(kept.kept) == [0, 1]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0), ("one two three", 0.0), ("one two three four", 0.0),
        ("a a a a a", 0.5),  # two runs of four, one of them new
        ("no it is not no it is not", 0.2),  # five runs; the last is the first again
    ],
)  # fmt: skip
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)
