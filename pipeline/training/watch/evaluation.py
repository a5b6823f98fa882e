"""TRL's evaluation, so that training does not feel it, and so that single pairs are seen: no second pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.training.watch.history import Pairs


class UnfeltEvaluation:
    """Stands before a Trainer in a class's bases: a run trains the same however often it is evaluated."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's evaluation; the generator that dropout draws from is afterwards where it was."""
        # Evaluation has no dropout, but each iterator over a DataLoader draws a seed for its workers.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]


class PairwiseEvaluation(UnfeltEvaluation):
    """Stands before TRL's DPOTrainer in a class's bases, and keeps each pair's figures of an evaluation.

    TRL logs means over batches, in which single pairs are gone. In front of each mean its loss gathers that figure
    from all processes, pair by pair: rewards of chosen and rejected, whether they are in order, margins, and the
    log-probabilities (`DPOTrainer._compute_loss` of TRL 1.16). Those are what is kept here. Should another TRL gather
    otherwise, nothing is kept.
    """

    accelerator: Any
    eval_dataset: Any
    _evaluated: list[torch.Tensor] | None = None
    """`[4, B]` a batch: rewards and completion tokens, of chosen and of rejected."""
    _differs = False
    last_pairs: Pairs | None = None
    """Of the last evaluation; None where they are not known."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """An evaluation, begun anew: one that a signal stopped leaves nothing behind."""
        self._evaluated, self._differs, self.last_pairs = None, False, None
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's evaluation of one batch."""
        with _listening(self.accelerator) as gathered:
            result = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        figures = gathered[-6:]  # other metrics come before
        if len(figures) == 6 and _are_rewards(*figures[:4]):
            # The first token of a row is predicted by nothing; a completion's tokens are those behind it.
            tokens = inputs["completion_mask"][..., 1:].sum(dim=1).to(self.accelerator.device)
            chosen_tokens, rejected_tokens = (self.accelerator.gather(half) for half in tokens.chunk(2))
            batch = torch.stack([figures[0], figures[1], chosen_tokens, rejected_tokens]).float().cpu()
            self._evaluated = [*(self._evaluated or []), batch]
        else:
            self._differs = True
        return result

    def take_pairs(self, step: int) -> Pairs | None:
        """What the evaluation that has just ended made of each pair, once; None where that is not known."""
        batches, differs = self._evaluated, self._differs
        self._evaluated, self._differs = None, False
        if batches is None or differs:
            return None
        # Where several processes share the rows, the last batch is filled up with the first rows again.
        chosen, rejected, chosen_tokens, rejected_tokens = torch.cat(batches, dim=1)[:, : len(self.eval_dataset)]
        self.last_pairs = Pairs(
            step, chosen.tolist(), rejected.tolist(), chosen_tokens.int().tolist(), rejected_tokens.int().tolist()
        )
        return self.last_pairs


def _are_rewards(chosen: torch.Tensor, rejected: torch.Tensor, in_order: torch.Tensor, margins: torch.Tensor) -> bool:
    """Whether four gathered figures are what they are taken for."""
    same_pairs = chosen.shape == rejected.shape == in_order.shape == margins.shape and chosen.dim() == 1
    if not same_pairs or not torch.isfinite(margins).all():
        return same_pairs
    return torch.equal(margins, chosen - rejected) and torch.equal(in_order, (chosen > rejected).to(in_order.dtype))


@contextmanager
def _listening(accelerator: Any) -> Iterator[list[torch.Tensor]]:
    """While open, everything that `accelerator.gather` gives is also kept in the list."""
    gathered: list[torch.Tensor] = []
    gather = accelerator.gather

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = gather(tensor)
        gathered.append(result.detach())
        return result

    accelerator.gather = keep
    try:
        yield gathered
    finally:
        del accelerator.gather
