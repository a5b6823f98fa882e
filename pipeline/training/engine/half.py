"""Weights in bfloat16, for products of gradients whose factors may be rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Half:
    """Weights in bfloat16, made when a product asks for them.

    Args:
        weights: float32, `[out, in]` each; they become one, `[all outs, in]`.
        kept: keeps it for the next product, unless a weight trains.
    """

    def __init__(self, weights: Sequence[torch.Tensor], *, kept: bool) -> None:
        self._weights = weights
        self._kept = kept
        self._last: tuple[list[int], torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """The weights as they are now, bfloat16."""
        versions = [weight._version for weight in self._weights]
        if self._last is not None and self._last[0] == versions:
            return self._last[1]
        halves = [weight.detach().bfloat16() for weight in self._weights]
        half = halves[0] if len(halves) == 1 else torch.cat(halves)
        if self._kept and not any(weight.requires_grad for weight in self._weights):
            self._last = versions, half
        return half
