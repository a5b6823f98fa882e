"""Attention of many short blocks at once: blocks of about one size are stacked, and multiplied together.

A micro-batch has a dozen parts of some fifty tokens. One by one, each is five small products and as many copies, whose
calls cost more than their numbers. Stacked, a block is filled up to the largest of its stack; what is filled in is
hidden, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_FILLED = 4096
"""Products of a query and a key that may be filled up to save the calls of another stack: what 64 by 64 cost is what
the calls cost, in float32 with nine heads of 64."""


class Block(NamedTuple):
    """Queries `start` to `stop` of a row, and the runs of keys that the last of them sees."""

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]

    @property
    def queries(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """How many."""
        return sum(stop - start for start, stop in self.runs)


class Stack(NamedTuple):
    """n blocks, filled up to q queries and k keys."""

    queries: torch.Tensor
    """`[n · q]`: the token of each query; that of a filled one is token 0."""
    keys: torch.Tensor
    """`[n · k]`: likewise."""
    filled: torch.Tensor
    """Which of the queries are filled in."""
    hidden: torch.Tensor
    """`[n, 1, q, 1, k]`: what is added to the scores: minus infinity where a query does not see a key, else 0."""


class Stacks(NamedTuple):
    """Blocks in stacks, and the way back."""

    stacks: tuple[Stack, ...]
    tokens: torch.Tensor
    """`[m]`: the tokens that are queries of a block, in their order."""
    slots: torch.Tensor
    """`[m]`: where each of them is among the queries of all stacks."""


def stacked(blocks: Sequence[Block], device: torch.device) -> Stacks:
    """Puts blocks of about one size together.

    Args:
        blocks: of one row.
        device: of the row.
    """
    groups: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: (-block.keys, -block.queries, block.start)):
        if groups and _area([*groups[-1], block]) <= _area(groups[-1]) + block.queries * block.keys + _FILLED:
            groups[-1].append(block)
        else:
            groups.append([block])
    places = [place for group in groups for place in _places(group)]
    order = sorted((token, slot) for slot, token in enumerate(places) if token is not None)
    return Stacks(
        tuple(_stack(group, device) for group in groups),
        torch.tensor([token for token, _ in order], device=device),
        torch.tensor([slot for _, slot in order], device=device),
    )


def _area(group: Sequence[Block]) -> int:
    """Products of a query and a key in a stack."""
    return len(group) * max(block.queries for block in group) * max(block.keys for block in group)


def _places(group: Sequence[Block]) -> list[int | None]:
    """The token of each query of a stack; None for one that is filled in."""
    most = max(block.queries for block in group)
    return [token for block in group for token in (*range(block.start, block.stop), *[None] * (most - block.queries))]


def _stack(group: Sequence[Block], device: torch.device) -> Stack:
    queries, most = _places(group), max(block.keys for block in group)
    keys: list[int] = []
    hidden = torch.full((len(group), len(queries) // len(group), most), float("-inf"))
    for own, block in zip(hidden, group, strict=True):
        seen = [token for run in block.runs for token in range(*run)]
        keys += seen + [0] * (most - len(seen))
        own[:, : block.keys] = 0  # a query that is filled in sees all, since it has to see something
        own[: block.queries, : block.keys].masked_fill_(
            torch.ones(block.queries, block.keys, dtype=torch.bool).triu(1 + block.keys - block.queries),
            float("-inf"),
        )
    return Stack(
        torch.tensor([token or 0 for token in queries], device=device),
        torch.tensor(keys, device=device),
        torch.tensor([slot for slot, token in enumerate(queries) if token is None], dtype=torch.long, device=device),
        hidden[:, None, :, None].to(device),
    )


def attend_in_stacks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stacks: Stacks, scaling: float
) -> torch.Tensor:
    """softmax(scaling · Q Kᵀ) V of what is stacked.

    Args:
        query: `[1, heads, T, d]`, float32.
        key: `[1, key heads, T, d]`.
        value: the same, of a width of their own in some models.
        stacks: of the row.
        scaling: of the products.

    Returns:
        `[1, m, heads, d]`, d the values', of the m tokens in `stacks.tokens`.
    """
    output: torch.Tensor = _attend(query, key, value, stacks, scaling)
    return output


class _Stacked(torch.autograd.Function):
    """Inside, a stack's tensors are `[n · key heads, q · g, d]`: the g query heads of a key head stand side by side."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stacks: Stacks, scaling: float
    ) -> torch.Tensor:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        asks, answers, values = (_by_token(states) for states in (query, key, value))
        outputs: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for stack in stacks.stacks:
            rows = _take(asks, stack.queries, len(stack.hidden), heads, group).mul_(scaling)
            seen = _take(answers, stack.keys, len(stack.hidden), heads)
            read = _take(values, stack.keys, len(stack.hidden), heads)
            scores = rows @ seen.mT
            scores.view(len(stack.hidden), heads, -1, group, seen.shape[1]).add_(stack.hidden)
            weights = torch.softmax(scores, dim=-1)
            outputs.append(_give_back(weights @ read, heads, group))
            kept += (rows, seen, read, weights)
        ctx.stacks, ctx.scaling, ctx.sizes = stacks, scaling, (heads, group, key.shape[2])
        ctx.save_for_backward(*kept)
        return _whole(outputs).index_select(0, stacks.slots).view(1, -1, heads * group, value.shape[3])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        stacks: Stacks = ctx.stacks
        heads, group, length = ctx.sizes
        kept = ctx.saved_tensors
        given = grads[0].reshape(grads[0].shape[1], -1)
        if len(stacks.tokens) < length:
            whole = given.new_zeros(length, given.shape[1])
            given = whole.index_copy_(0, stacks.tokens, given)
        to_asks: list[torch.Tensor] = []
        to_answers = to_values = given.new_empty(0)
        for at, stack in enumerate(stacks.stacks):
            rows, seen, read, weights = kept[4 * at : 4 * at + 4]
            into = _take(given, stack.queries, len(stack.hidden), heads, group, filled=stack.filled)
            through = torch._softmax_backward_data(into @ read.mT, weights, -1, weights.dtype)
            to_asks.append(_give_back((through @ seen).mul_(ctx.scaling), heads, group))
            to_seen = _give_back(through.mT @ rows, heads)
            to_read = _give_back(weights.mT @ into, heads)
            if not at:
                to_answers = to_seen.new_zeros(length, to_seen.shape[1])
                to_values = to_read.new_zeros(length, to_read.shape[1])
            to_answers.index_add_(0, stack.keys, to_seen)
            to_values.index_add_(0, stack.keys, to_read)
        to_query = _whole(to_asks).index_select(0, stacks.slots)
        if len(stacks.tokens) < length:
            to_query = to_query.new_zeros(length, to_query.shape[1]).index_copy_(0, stacks.tokens, to_query)

        def by_head(states: torch.Tensor, count: int) -> torch.Tensor:
            return states.view(1, length, count, -1).transpose(1, 2)

        return by_head(to_query, heads * group), by_head(to_answers, heads), by_head(to_values, heads), None, None


_attend: Any = _Stacked.apply


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """`[1, heads, T, d]` as `[T, heads · d]`."""
    return states[0].transpose(0, 1).reshape(states.shape[2], -1)


def _take(
    states: torch.Tensor,
    tokens: torch.Tensor,
    count: int,
    heads: int,
    group: int = 1,
    *,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """A stack of `[T, heads · g · d]` as `[n · heads, q · g, d]`; what is `filled` in holds 0, where that is given."""
    taken = states.index_select(0, tokens)
    if filled is not None and len(filled):
        taken.index_fill_(0, filled, 0.0)
    each = len(tokens) // count
    turned = taken.view(count, each, heads, -1).transpose(1, 2)
    return turned.reshape(count * heads, each * group, -1)


def _give_back(stack: torch.Tensor, heads: int, group: int = 1) -> torch.Tensor:
    """`[n · heads, q · g, d]` as `[n · q, heads · g · d]`."""
    each = stack.shape[1] // group
    turned = stack.view(-1, heads, each, group * stack.shape[2]).transpose(1, 2)
    return turned.reshape(-1, heads * group * stack.shape[2])


def _whole(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
