"""Attention over the parts of a row, none of which sees more than it may: on each device the way that is fastest there.

Nothing is computed for pairs of tokens that do not see each other, where one call with a mask over the whole row would
compute all of them. Sliding windows count positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.training.engine import blocks, varlen
from pipeline.training.engine.joint import Joint
from pipeline.training.engine.parts import Part, Row
from pipeline.training.engine.short import attend, plainly_causal

NAME = "shared_prompt"


def attend_in_parts(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row, **kwargs: Any
) -> torch.Tensor:
    """What Transformers' SDPA function gives for each part, over what the part sees.

    Args:
        module: the attention layer.
        query: `[1, heads, T, d]`.
        key: `[1, key heads, T, d]`.
        value: the same, of a width of their own in some models.
        row: its parts.
        **kwargs: what the layer hands to its attention: `dropout`, `scaling`, `sliding_window` and whatever else.

    Returns:
        `[1, T, heads, d]`, d the values'.
    """
    window = row.narrower(kwargs.get("sliding_window"))
    scaling = kwargs.get("scaling")
    if blocks.takes(module, query, window, **kwargs):
        return blocks.attend_in_blocks(query, key, value, row, scaling)
    if varlen.takes(module, query, key, value, **kwargs):
        return varlen.attend_in_one_call(query, key, value, row, scaling, window)

    def run(part: Part, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        mask = None
        if not plainly_causal(part.keys - part.length, part.length) or (window is not None and part.keys > window):
            mask = row.mask(part, window, query.device)
        return attend(module, queries, keys, values, mask, **kwargs)

    return part_by_part(query, key, value, row, run)


def part_by_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row, run: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Calls an attention for each part.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, key heads, T, d]`.
        value: the same.
        row: its parts.
        run: takes a part, its queries, and the keys and values that it sees; gives `[1, length, heads, d]`.

    Returns:
        `[1, T, heads, d]`.
    """
    queries = torch.split(query, [part.length for part in row.parts], dim=2)
    keys, values = (
        [torch.cat(runs, dim=2) if len(runs) > 1 else runs[0] for runs in row.seen(states)] for states in (key, value)
    )
    return torch.cat([run(*given) for given in zip(row.parts, queries, keys, values, strict=True)], dim=1)


def joint_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    joint: Joint | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA where there is no joint row, and the same in parts where there is one.

    Args:
        module: the attention layer.
        query: `[1, heads, T, d]`.
        key: `[1, key heads, T, d]`.
        value: the same.
        attention_mask: what the model made of the one it got; a joint row brings its own.
        joint: the row's layout.
        **kwargs: what the layer hands to its attention.

    Returns:
        `[1, T, heads, d]`, and None for the weights.
    """
    if joint is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    joint.layers += 1
    return attend_in_parts(module, query, key, value, joint.row, **kwargs), None


AttentionInterface.register(NAME, joint_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
