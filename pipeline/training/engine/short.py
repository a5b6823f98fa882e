"""Attention over a few hundred tokens by plain products, where that is faster than a kernel made for long rows.

The kernel behind SDPA on a CPU works in blocks, for memory that does not grow with the square of the row; on rows of a
usual preference its backward pass takes two to three times as long as the products themselves. They keep the weights
of attention for the backward pass, so the rule stops where these would take more room than what a block keeps anyway.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_SCORES = 256 * 256
"""Queries times keys of a head: measured break-even in float32 between 300 by 300 and 300 by 600, forward and backward;
at 256 the weights take 1 kB a token and head."""
_MORE = ("position_bias", "cache", "softcap")
"""What SDPA's function does beyond the products, or refuses."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """What Transformers' SDPA function gives, one way or the other.

    Args:
        module: the attention layer.
        query: `[1, heads, T, d]`.
        key: `[1, key heads, S, d]`.
        value: the same.
        mask: `[1, 1, T, S]`, booleans or what is added to the scores; None: causal.
        **kwargs: what the layer hands to its attention.

    Returns:
        `[1, T, heads, d]`.
    """
    short = query.shape[2] * key.shape[2] <= _SCORES and query.device.type == "cpu" and query.dtype == torch.float32
    more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in _MORE)
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    clear = mask is not None or (causal and query.shape[2] == key.shape[2])
    if more or not short or not clear:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]  # type: ignore[no-any-return]
    scaling = kwargs.get("scaling")
    return _products(query, key, value, mask, query.shape[3] ** -0.5 if scaling is None else scaling)


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling · Q Kᵀ + mask) V; the query heads of one key head are the rows of one product."""
    _, heads, length, width = query.shape
    groups = key.shape[1]
    rows = query.reshape(groups, -1, width) * scaling
    scores = (rows @ key[0].mT).view(groups, -1, length, key.shape[2])
    if mask is None:
        mask = _causal(length)
    scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).view(groups, -1, key.shape[2])
    return (weights @ value[0]).view(1, heads, length, -1).transpose(1, 2)


@lru_cache(maxsize=64)
def _causal(length: int) -> torch.Tensor:
    """`[length, length]`: 0 up to a query's own key, minus infinity behind it."""
    return torch.full((length, length), float("-inf")).triu(1)
