"""The mixin on a trainer that gathers as TRL's loss does, in batches of which the last is filled up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.training.watch.evaluation import PairwiseEvaluation

CHOSEN, REJECTED = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])


class Accelerator:
    device = torch.device("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Stock:
    """`prediction_step` of DPOTrainer as far as it gathers: other metrics first, then six figures a pair."""

    def __init__(self, figures: Callable[[], list[torch.Tensor]]) -> None:
        self.accelerator = Accelerator()
        self.eval_dataset = range(3)
        self.figures = figures

    def prediction_step(self, model: Any, inputs: Any, *args: Any) -> str:
        for figure in [torch.tensor(7.0), *self.figures()]:
            self.accelerator.gather(figure)
        return "TRL's result"


class Trainer(PairwiseEvaluation, Stock):
    pass


def as_trl() -> list[torch.Tensor]:
    logps = torch.tensor([-9.0, -8.0])
    return [CHOSEN, REJECTED, (CHOSEN > REJECTED).float(), CHOSEN - REJECTED, logps, logps]


def batch() -> dict[str, torch.Tensor]:
    """Two pairs in rows of five: completions of 2 and 3 tokens, and of 1 and 4, of which the first opens its row."""
    return {
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
    }


def test_pairs_of_an_evaluation_once_and_no_more_than_there_are_rows() -> None:
    trainer = Trainer(as_trl)
    assert [trainer.prediction_step(None, batch()) for _ in range(2)] == ["TRL's result"] * 2
    pairs = trainer.take_pairs(5)
    assert pairs is not None
    assert (pairs.step, pairs.chosen_rewards, pairs.rejected_rewards) == (5, [1, 2, 1], [0.5, 3, 0.5])
    assert (pairs.chosen_tokens, pairs.rejected_tokens) == ([2, 3, 2], [1, 4, 1])
    assert pairs.margins == [0.5, -1, 0.5]
    assert trainer.take_pairs(5) is None
    assert "gather" not in vars(trainer.accelerator)


@pytest.mark.parametrize(
    "otherwise",
    [
        lambda: [CHOSEN, REJECTED],
        lambda: as_trl()[::-1],
        lambda: [*as_trl()[:3], CHOSEN + REJECTED, *as_trl()[4:]],
        lambda: [figure.mean() for figure in as_trl()],
    ],
    ids=["fewer", "another order", "no margins", "means"],
)
def test_what_is_gathered_otherwise_is_not_taken_for_pairs(otherwise: Callable[[], list[torch.Tensor]]) -> None:
    trainer = Trainer(otherwise)
    assert trainer.prediction_step(None, batch()) == "TRL's result"
    assert trainer.take_pairs(0) is None


def test_listening_ends_where_an_evaluation_fails() -> None:
    def broken() -> list[torch.Tensor]:
        raise RuntimeError

    trainer = Trainer(broken)
    with pytest.raises(RuntimeError):
        trainer.prediction_step(None, batch())
    assert "gather" not in vars(trainer.accelerator)
