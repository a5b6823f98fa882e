"""Weights in bfloat16, for products of gradients whose factors may be rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.training.engine.prepacked import pack, packs, product


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

    def through(self, into: torch.Tensor) -> torch.Tensor:
        """`into` W, of the weights as they are now.

        Args:
            into: `[T, all outs]`, bfloat16.

        Returns:
            `[T, in]`, float32.
        """
        versions = [weight._version for weight in self._weights]
        if self._last is None or self._last[0] != versions:
            halves = [weight.detach().bfloat16() for weight in self._weights]
            half = (halves[0] if len(halves) == 1 else torch.cat(halves)).T
            if not self._kept or any(weight.requires_grad for weight in self._weights):
                return product(into, half).float()
            self._last = versions, pack(half) if packs(half) else half
        return product(into, self._last[1]).float()
