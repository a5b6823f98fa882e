"""Causal attention over the parts of a row in one call, in half precision on CUDA.

FlashAttention takes many sequences of unequal length at once, and of each more keys than queries: the last query then
stands at the last key. So a part is a sequence whose keys are what stands before it and itself. Keys that several
parts see are handed over once for each of them.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from pipeline.training.engine.parts import Part, Row
from pipeline.training.engine.short import asks_for_no_more

_WIDEST = 256
"""Of a head: FlashAttention's bound."""
_OLDEST = (8, 0)
"""Compute capability that FlashAttention 2 asks for: Ampere."""


def takes(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> bool:
    """Whether `attend_in_one_call` does what a layer asks of its attention, where it asks.

    Args:
        module: the attention layer.
        query: what it asks with.
        key: with what it answers.
        value: what it answers.
        **kwargs: what the layer hands to its attention.
    """
    width = query.shape[3]
    return (
        query.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= _OLDEST
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and width == value.shape[3]
        and width <= _WIDEST
        and width % 8 == 0
        and asks_for_no_more(module, masked=False, **kwargs)
        and _keeps_its_word(query.device, query.dtype, (query.shape[1], key.shape[1], width))
    )


def attend_in_one_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row, scaling: float | None, window: int | None
) -> torch.Tensor:
    """softmax(scaling · Q Kᵀ) V within each part and what it sees.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, key heads, T, d]`.
        value: the same.
        row: its parts.
        scaling: of the products; None: 1 / sqrt(d).
        window: how many positions back a token sees, itself counted; None: all.

    Returns:
        `[1, T, heads, d]`.
    """
    behind_others = any(part.before for part in row.parts)

    def laid_out(states: torch.Tensor) -> torch.Tensor:
        """`[keys of all parts, heads, d]`."""
        if behind_others:
            states = torch.cat([run for runs in row.seen(states) for run in runs], dim=2)
        return states[0].transpose(0, 1)

    queries_at, keys_at = row.bounds(query.device)
    output = varlen_attn(
        query[0].transpose(0, 1),
        laid_out(key),
        laid_out(value),
        queries_at,
        keys_at,
        max(part.length for part in row.parts),
        row.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # it counts those before the query
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)  # nothing else was asked for
    return output[None]


@lru_cache(maxsize=16)
def _keeps_its_word(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Whether the kernel computes what it is taken for, values and gradients, on a row of four parts; warns if not.

    Args:
        device: of the kernel.
        dtype: half precision.
        shape: heads, key heads, and the width of one.
    """
    heads, key_heads, width = shape
    row = Row([Part(0, 5), Part(5, 12, ((0, 5),)), Part(12, 13, ((0, 5), (5, 12))), Part(13, 40, ((0, 5),))])
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, count, 40, width, generator=generator) for count in (heads, key_heads, key_heads)]

    def results(attend: Any, states: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
        leaves = [one.requires_grad_() for one in states]
        with torch.enable_grad():
            output = attend(*leaves, window)
            weights = torch.arange(output.numel(), device=output.device).view(output.shape).cos()
            return [output, *torch.autograd.grad((output * weights).sum(), leaves)]

    def plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
        groups = heads // key_heads
        keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mask = torch.zeros(40, 40, dtype=torch.bool)
        for part in row.parts:
            places = [at for run in (*part.before, (part.start, part.stop)) for at in range(*run)]
            mask[part.start : part.stop, places] = row.mask(part, window, mask.device)[0, 0]
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask).transpose(1, 2)

    def in_one_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
        return attend_in_one_call(query, key, value, row, None, window)

    try:
        for window in (None, 6):
            own = results(in_one_call, [one.to(device, dtype) for one in whole], window)
            for one, other in zip(own, results(plainly, [one.clone() for one in whole], window), strict=True):
                torch.testing.assert_close(one.float().cpu(), other.detach(), rtol=0.05, atol=0.1)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        warnings.warn(
            f"attention goes part by part: the kernel for unequal lengths does not do as it says on {device}: "
            f"{' '.join(str(error).split())[:200]}",
            stacklevel=2,
        )
        return False
    return True
