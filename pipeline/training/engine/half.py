"""A weight in bfloat16, for products of gradients whose factors may be rounded."""

from __future__ import annotations

import torch


class Half:
    """A weight in bfloat16, made when a product asks for it.

    Args:
        weight: float32.
        kept: keeps it for the next product, unless the weight trains.
    """

    def __init__(self, weight: torch.Tensor, *, kept: bool) -> None:
        self._weight = weight
        self._kept = kept
        self._last: tuple[int, torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """The weight as it is now, bfloat16."""
        version = self._weight._version
        if self._last is not None and self._last[0] == version:
            return self._last[1]
        half = self._weight.detach().bfloat16()
        if self._kept and not self._weight.requires_grad:
            self._last = version, half
        return half
