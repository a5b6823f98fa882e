"""Log-probabilities that `pipeline dpo` kept of its reference, taken where the model in memory confirms a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.data.tokens import Pair
from pipeline.evaluation.preference import PairLogps
from pipeline.training.engine.reference import SAMPLE, Logps, row_digest


@dataclass(frozen=True)
class KeptLogps:
    """What is kept of one set of weights."""

    logps: Logps
    tolerance: float
    """How far a pair scored again may be from what was kept, in nats."""

    def of(self, pairs: Sequence[Pair], score: PairLogps) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of the chosen and of the rejected completions, `[B]` float32 nats each.

        Args:
            pairs: at least one.
            score: scores pairs by the model in memory.

        Returns:
            None where a pair is not kept, or one of a sample scores otherwise.
        """
        found = [self.logps.get(row_digest(pair._asdict())) for pair in pairs]
        known = [one for one in found if one is not None]
        if len(known) < len(pairs):
            return None
        kept = torch.tensor(known)
        sample = sorted({at * len(pairs) // SAMPLE for at in range(SAMPLE)})
        again = torch.stack(score([pairs[at] for at in sample]), dim=1)
        if not float((again - kept[sample]).abs().max()) <= self.tolerance:
            return None
        return kept[:, 0], kept[:, 1]
