"""What a faster path is tried on before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ROUNDING = 1e-3
"""Difference of a token's log-probability, in nats, that is rounding in float32."""
_HALF_ROUNDING = 0.1
"""The same in half precision."""


def rounding_of(dtype: torch.dtype, *, rounds: bool = False) -> float:
    """How far two paths may read a token's log-probability apart, in nats, by rounding alone: a mean over tokens.

    Args:
        dtype: of the weights.
        rounds: whether float32 products are rounded to fewer bits.
    """
    return _ROUNDING if dtype == torch.float32 and not rounds else _HALF_ROUNDING


def window_of(config: Any) -> int | None:
    """How many tokens back a layer of the model sees, where one sees less than all."""
    window: int | None = getattr(config.get_text_config(), "sliding_window", None)
    return window


def trial_rows(lengths: Sequence[int], count: int, window: int | None) -> list[int]:
    """The shortest rows, since each costs a pass on both paths, and one that overruns the sliding window if any does.

    Args:
        lengths: in tokens, of all rows.
        count: how many.
        window: the model's, if it has one.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = order[:count]
    beyond = next((at for at in order if window is not None and lengths[at] > window), None)
    if beyond is not None and beyond not in chosen:
        chosen[len(chosen) // 2] = beyond
    return chosen
