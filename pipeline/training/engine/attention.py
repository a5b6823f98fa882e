"""Attention over a joint row, part by part: the front, each pair's shared tokens over it, each branch over both.

Nothing is computed for pairs of tokens in different rows or branches, where one call with a mask over the whole row
would compute all of them. Sliding windows count positions.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.training.engine.blocks import attend_parts, takes
from pipeline.training.engine.joint import Joint
from pipeline.training.engine.short import attend

NAME = "shared_prompt"


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
    """Transformers' SDPA where there is no joint row, and the same part by part where there is one.

    Args:
        module: the attention layer.
        query: `[1, heads, T, width]`.
        key: the same, of as many heads as the layer keeps keys for.
        value: as `key`.
        attention_mask: what the model made of the one it got; a joint row brings its own.
        joint: the row's layout.
        kwargs: `dropout`, `scaling`, `sliding_window` and whatever else SDPA's function takes.

    Returns:
        `[1, T, heads, width]`, and None for the weights.
    """
    if joint is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    joint.layers += 1
    window = kwargs.get("sliding_window")
    if takes(module, query, joint.narrower(window), **kwargs):
        return attend_parts(query, key, value, joint.parts, kwargs.get("scaling")), None
    flat = [joint.front, *(size for sizes in joint.sizes for size in sizes)]
    # Split and put together whole: slices would each give a gradient of the row's full size.
    parts = [torch.split(tensor, flat, dim=2) for tensor in (query, key, value)]
    outputs = []

    def part(at: int, before: list[torch.Tensor]) -> list[torch.Tensor]:
        """Attends one part over what stands before it, keys and values, and itself; returns these of both."""
        queries, *own = (tensors[at] for tensors in parts)
        length = queries.shape[2]
        if not length:
            return before
        seen = [torch.cat(pair, dim=2) if pair[0].shape[2] else pair[1] for pair in zip(before, own, strict=True)]
        mask = joint.mask(before[0].shape[2], length, window, query)
        outputs.append(attend(module, queries, seen[0], seen[1], mask, **kwargs))
        return seen

    nothing = [tensor[:, :, :0] for tensor in (key, value)]
    front = part(0, nothing)
    for pair in range(len(joint.sizes)):
        shared = part(3 * pair + 1, front)
        for branch in (2, 3):
            part(3 * pair + branch, shared)
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, joint_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
