"""Attention over a few hundred tokens by plain products, where that is faster than a kernel made for long rows.

The kernel behind SDPA on a CPU works in blocks, for memory that does not grow with the square of the row; on rows of a
usual preference its backward pass takes two to three times as long as the products themselves. They keep the weights
of attention for the backward pass, so the rule stops where these would take more room than what a block keeps anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_rows"
_SCORES = 256 * 256
"""Queries times keys of a head: measured break-even in float32 between 300 by 300 and 300 by 600, forward and backward;
at 256 the weights take 1 kB a token and head."""
_WEIGHTS = 2**24
"""Weights of attention of all rows and heads at once: 64 MiB."""
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
        query: `[B, heads, T, d]`.
        key: `[B, key heads, S, d]`.
        value: the same.
        mask: `[B or 1, 1, T, S]`, booleans or what is added to the scores; None: causal, the last query sees all.
        **kwargs: what the layer hands to its attention.

    Returns:
        `[B, T, heads, d]`.
    """
    scores = query.shape[2] * key.shape[2]
    short = scores <= _SCORES and query.shape[0] * query.shape[1] * scores <= _WEIGHTS
    behind = key.shape[2] - query.shape[2] if mask is None and query.shape[2] > 1 else 0
    if not short or not asks_for_products(module, query, masked=mask is not None, **kwargs):
        # SDPA's kernels know causality where there are as many queries as keys, and are slower with a mask.
        whole = pad(query, (0, 0, behind, 0))
        output: torch.Tensor = sdpa_attention_forward(module, whole, key, value, mask, **kwargs)[0]
        return output[:, behind:]
    scaling = kwargs.get("scaling")
    return _products(query, key, value, mask, query.shape[3] ** -0.5 if scaling is None else scaling)


def asks_for_products(module: torch.nn.Module, query: torch.Tensor, *, masked: bool, **kwargs: Any) -> bool:
    """Whether plain products do what a layer asks of its attention, and are worth it: in float32 on a CPU.

    Args:
        module: the attention layer.
        query: what it asks with.
        masked: whether a mask says what is seen; else it has to be causal.
        **kwargs: what the layer hands to its attention.
    """
    fits = query.device.type == "cpu" and query.dtype == torch.float32
    return fits and asks_for_no_more(module, masked=masked, **kwargs)


def asks_for_no_more(module: torch.nn.Module, *, masked: bool, **kwargs: Any) -> bool:
    """Whether a layer wants softmax(Q Kᵀ) V and nothing else: no dropout, no bias, no cap; causal unless it is masked.

    Args:
        module: the attention layer.
        masked: whether a mask says what is seen.
        **kwargs: what the layer hands to its attention.
    """
    more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in _MORE)
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    return not more and (masked or causal)


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling · Q Kᵀ + mask) V; the query heads of one key head are the rows of one product."""
    batch, heads, length, width = query.shape
    keys = key.shape[2]
    rows = query.reshape(batch * key.shape[1], -1, width) * scaling
    scores = (rows @ key.reshape(-1, keys, width).mT).view(batch, heads, length, keys)
    if mask is None and length > 1:
        mask = _causal(length, keys)
    if mask is not None:
        # The least number rather than minus infinity: a query of padding, which sees nothing, stays a number.
        lowest = torch.finfo(scores.dtype).min
        scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, lowest)
    weights = scores.softmax(dim=-1).view(rows.shape[0], -1, keys)
    return (weights @ value.reshape(rows.shape[0], keys, -1)).view(batch, heads, length, -1).transpose(1, 2)


def short_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attend`, as Transformers calls an attention."""
    return attend(module, query, key, value, attention_mask, **kwargs), None


def attend_with(model: Any, name: str, instead_of: Sequence[str] | None = ("sdpa",)) -> list[tuple[Any, str]]:
    """Has a model's layers take another attention.

    Args:
        model: whose layers; PEFT's copies of blocks have configurations of their own.
        name: of the attention, as it is registered with Transformers.
        instead_of: those in whose place it is put; None: any.

    Returns:
        The configurations that name it now, each with the attention that it named before.
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    named = [(config, getattr(config, "_attn_implementation", None)) for config in configs]
    own = [(config, before) for config, before in named if before and (instead_of is None or before in instead_of)]
    for config, _ in own:
        config._attn_implementation = name
    return own


@contextmanager
def attending(model: Any, name: str, instead_of: Sequence[str] | None = ("sdpa",)) -> Iterator[bool]:
    """`attend_with` while it is open; gives whether any layer takes it."""
    own = attend_with(model, name, instead_of)
    try:
        yield bool(own)
    finally:
        for config, before in own:
            config._attn_implementation = before


def attending_by_products(model: Any) -> AbstractContextManager[bool]:
    """While open, attention that the model would leave to SDPA goes by products where rows are short."""
    return attending(model, NAME)


@lru_cache(maxsize=64)
def _causal(length: int, keys: int) -> torch.Tensor:
    """`[length, keys]`: 0 up to a query's own key, minus infinity behind it; the last query's own is the last key."""
    return torch.full((length, keys), float("-inf")).triu(1 + keys - length)


@lru_cache(maxsize=512)
def hidden_behind(length: int, group: int) -> torch.Tensor:
    """`[length · group, length]`: minus infinity behind a query's own key, else 0; a query has `group` rows."""
    return torch.full((length, length), float("-inf")).triu(1).repeat_interleave(group, dim=0)


def plainly_causal(before: int, length: int) -> bool:
    """Whether `length` queries behind `before` others need no mask of `attend`: these others are then padding to it."""
    return 4 * before <= length


@contextmanager
def own_masks() -> Iterator[None]:
    """While open, no mask is taken from before, and none that is made stays: those of a trace have no storage."""
    made = (_causal, hidden_behind)
    for mask in made:
        mask.cache_clear()
    try:
        yield
    finally:
        for mask in made:
            mask.cache_clear()


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
