"""The joint row: the pairs of a batch in one row without padding, what two completions share only once.

TRL scores a pair as two rows, `prompt + chosen` and `prompt + rejected`. Here a pair is

    shared | chosen | rejected

where `shared` is everything up to the token before the first at which the two rows differ: the prompt, and as much
of the completions as is the same. That token itself predicts two different next tokens, so each branch begins with
a copy of it. A branch sees the shared part and itself; its positions go on where the shared part ends. The pairs of
a batch stand one behind the other and do not see each other.

What all pairs of the batch begin with, a system prompt or a template's first lines, stands once in front of them; every
pair sees it, and its shared part is what is left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline.data.tokens import common_prefix
from pipeline.training.engine.parts import Part, Row

_WORTH = 8
"""Tokens that a batch has to begin with before they get a part of their own: each part is a call of attention."""


@dataclass
class Joint:
    """A batch of B pairs as one row of T tokens, and the way back to TRL's `[2B, S]`."""

    input_ids: torch.Tensor
    """`[1, T]`."""
    position_ids: torch.Tensor
    """`[1, T]`."""
    sizes: list[tuple[int, int, int]]
    """Tokens of `shared` behind `front`, `chosen` and `rejected`, for each pair."""
    source: torch.Tensor
    """`[2B * S]`: where in the row each position of TRL's batch is computed; 0 for one that nothing reads."""
    repeated: torch.Tensor
    """`[B, S - 1]`: whether a position of a rejected row, and its next token, are those of the chosen one."""
    front: int = 0
    """Tokens in front of all pairs, which all of them begin with."""
    layers: int = 0
    """How many attention layers have read it."""

    @cached_property
    def row(self) -> Row:
        """The front, then shared tokens, chosen and rejected of each pair, and what each of them sees."""
        parts = [Part(0, self.front)]
        front = ((0, self.front),) if self.front else ()
        start = self.front
        for shared, chosen, rejected in self.sizes:
            end = start + shared
            before = (*front, (start, end)) if shared else front
            parts.append(Part(start, end, front))
            parts += [Part(end, end + chosen, before), Part(end + chosen, end + chosen + rejected, before)]
            start = end + chosen + rejected
        return Row(parts)


def joint_sizes(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[int, int, int]:
    """How many tokens of `shared`, `chosen` and `rejected` the two rows of a pair take in a joint row."""
    shared = max(common_prefix(chosen, rejected) - 1, 0)
    return shared, len(chosen) - 1 - shared, len(rejected) - 1 - shared


def join(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, *, keep_last: bool = False, apart: bool = False
) -> Joint:
    """The joint row of TRL's batch.

    Args:
        input_ids: `[2B, S]`, chosen rows before rejected ones, padded on the right.
        attention_mask: `[2B, S]`.
        keep_last: computes the last token of each row too, which predicts nothing: for a loss on routers.
        apart: gives no pair anything in common with another.
    """
    rows, length = input_ids.shape
    count = rows // 2
    tokens = [ids[:used] for ids, used in zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)]
    front = 0 if apart else _front(tokens[:count], tokens[count:])
    ids: list[int] = tokens[0][:front]
    positions: list[int] = list(range(front))
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
        ids += chosen[front:shared]
        positions += range(front, shared)
        for row, sequence, size in zip((pair, count + pair), (chosen, rejected), branches, strict=True):
            source[row, :front] = torch.arange(front)
            source[row, front:shared] = torch.arange(start, start + shared - front)
            branch = sequence[shared : shared + size]
            source[row, shared : shared + len(branch)] = torch.arange(len(ids), len(ids) + len(branch))
            ids += branch
            positions += range(shared, shared + len(branch))
        sizes.append((shared - front, branches[0], branches[1]))
    device = input_ids.device
    return Joint(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        sizes,
        source.flatten().to(device),
        repeated.to(device),
        front,
    )


def _front(chosen: Sequence[list[int]], rejected: Sequence[list[int]]) -> int:
    """How many tokens the shared parts of all pairs begin with; 0 where it is not worth a part of its own."""
    if len(chosen) < 2:
        return 0
    shared = [one[: joint_sizes(one, other)[0]] for one, other in zip(chosen, rejected, strict=True)]
    length = common_prefix(min(shared), max(shared))
    return length if length >= _WORTH else 0
