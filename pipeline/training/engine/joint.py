"""The joint row: the pairs of a batch in one row without padding, what two completions share only once.

TRL scores a pair as two rows, `prompt + chosen` and `prompt + rejected`. Here a pair is

    shared | chosen | rejected

where `shared` is everything up to the token before the first at which the two rows differ: the prompt, and as much
of the completions as is the same. That token itself predicts two different next tokens, so each branch begins with
a copy of it. A branch sees the shared part and itself; its positions go on where the shared part ends. The pairs of
a batch stand one behind the other and do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.data.tokens import common_prefix


@dataclass
class Joint:
    """A batch of B pairs as one row of T tokens, and the way back to TRL's `[2B, S]`."""

    input_ids: torch.Tensor
    """`[1, T]`."""
    position_ids: torch.Tensor
    """`[1, T]`."""
    sizes: list[tuple[int, int, int]]
    """Tokens of `shared`, `chosen` and `rejected`, for each pair."""
    source: torch.Tensor
    """`[2B * S]`: where in the row each position of TRL's batch is computed; 0 for one that nothing reads."""
    repeated: torch.Tensor
    """`[B, S - 1]`: whether a position of a rejected row, and its next token, are those of the chosen one."""
    layers: int = 0
    """How many attention layers have read it."""
    _masks: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def mask(self, before: int, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """What the tokens of one part see of `before` shared tokens and of each other.

        Args:
            before: tokens of the shared part.
            length: tokens of the part.
            window: how many positions back a token sees, itself counted; None: all.
            like: gives precision and device.

        Returns:
            `[1, 1, length, before + length]` to add to the scores; None where it is plainly causal.
        """
        reaches = window is None or before + length <= window
        if before == 0 and reaches:
            return None
        key = (before, length, None if reaches else window, like.dtype, like.device)
        if key not in self._masks:
            at = torch.arange(before, before + length, device=like.device)[:, None]
            seen = torch.arange(before + length, device=like.device)[None, :]
            hidden = seen > at
            if not reaches:
                hidden |= seen <= at - (window or 0)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill(hidden, float("-inf"))[None, None]
        return self._masks[key]


def joint_sizes(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[int, int, int]:
    """How many tokens of `shared`, `chosen` and `rejected` the two rows of a pair take in a joint row."""
    shared = max(common_prefix(chosen, rejected) - 1, 0)
    return shared, len(chosen) - 1 - shared, len(rejected) - 1 - shared


def join(input_ids: torch.Tensor, attention_mask: torch.Tensor, *, keep_last: bool = False) -> Joint:
    """The joint row of TRL's batch.

    Args:
        input_ids: `[2B, S]`, chosen rows before rejected ones, padded on the right.
        attention_mask: `[2B, S]`.
        keep_last: computes the last token of each row too, which predicts nothing: for a loss on routers.
    """
    rows, length = input_ids.shape
    count = rows // 2
    tokens = [ids[:used] for ids, used in zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)]
    ids: list[int] = []
    positions: list[int] = []
    sizes: list[tuple[int, int, int]] = []
    source = torch.zeros(rows, length, dtype=torch.long)
    repeated = torch.zeros(count, length - 1, dtype=torch.bool)
    for pair in range(count):
        chosen, rejected = tokens[pair], tokens[count + pair]
        last = 1 if keep_last else 0
        shared, *branches = joint_sizes(chosen, rejected)
        branches = [branch + last for branch in branches]
        repeated[pair, :shared] = True
        start = len(ids)
        ids += chosen[:shared]
        positions += range(shared)
        for row, sequence, size in zip((pair, count + pair), (chosen, rejected), branches, strict=True):
            source[row, :shared] = torch.arange(start, start + shared)
            branch = sequence[shared : shared + size]
            source[row, shared : shared + len(branch)] = torch.arange(len(ids), len(ids) + len(branch))
            ids += branch
            positions += range(shared, shared + len(branch))
        sizes.append((shared, branches[0], branches[1]))
    device = input_ids.device
    return Joint(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        sizes,
        source.flatten().to(device),
        repeated.to(device),
    )
