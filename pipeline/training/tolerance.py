"""How far two readings of a log-probability under equal weights may be apart, by precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """How far equal weights may read apart, in nats of a whole completion."""

    start: float
    """Between the SFT adapter reopened from the disk and the reference in the trainer: another order of sums, and
    the rounding of the fold."""
    drift: float
    """Between the reference before and after, on the same batches: the same sums in the same order."""

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded to half precision's bits."""
        return self.drift == 0.0


def tolerance_for(dtype: torch.dtype, quantize: str = "none", *, rounds: bool = False) -> Tolerance:
    """float32: 0.02 nats at the start and exactly none of drift; half precision: 1 nat and 0.01.

    Args:
        dtype: of the base's weights.
        quantize: a base in four bits (`nf4`) computes in bfloat16 whatever the rest is held in.
        rounds: whether float32 products are rounded to half precision's bits, or nearly so.
    """
    exact = dtype == torch.float32 and quantize == "none" and not rounds
    return Tolerance(0.02, 0.0) if exact else Tolerance(1.0, 0.01)
