"""Causal attention over parts of one row by plain products, on a CPU, with a backward pass of its own.

The queries of a part are taken in blocks, and a block is multiplied with no key behind its last query: of a long part
that is half. The kernel behind SDPA does as little, but its backward pass takes two to three times as long as the
products themselves.

Blocks of few keys are stacked, and their weights are kept for the backward pass; of those with many the weights are
made again, block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from pipeline.training.engine.parts import Part, Row
from pipeline.training.engine.short import asks_for_products, hidden_behind
from pipeline.training.engine.stacks import Block, Stacks, attend_in_stacks, stacked

_QUERIES = 128
"""Queries in a block."""
_KEPT = 512
"""Keys of a block up to which it is stacked, and its weights are kept: 2 kB a token and head. Forward and backward of a
micro-batch of pairs with up to 350 keys took 21.7 ms a layer in place of 25.2 with 256, in turns."""


class _Plan(NamedTuple):
    """The blocks of a row."""

    short: Stacks | None
    long: tuple[tuple[Part, tuple[Block, ...]], ...]
    """Those with many keys, by their part."""
    order: torch.Tensor | None
    """`[T]`: where each token is behind each other in what the two give; None where there is but one of them."""


def takes(module: torch.nn.Module, query: torch.Tensor, window: int | None, **kwargs: Any) -> bool:
    """Whether `attend_in_blocks` does what a layer asks of its attention.

    Args:
        module: the attention layer.
        query: what it asks with.
        window: how many tokens back a query sees, where that is not all.
        **kwargs: what the layer hands to its attention.
    """
    return window is None and asks_for_products(module, query, masked=False, **kwargs)


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Row, scaling: float | None
) -> torch.Tensor:
    """softmax(scaling · Q Kᵀ) V within each part and what it sees.

    Args:
        query: `[1, heads, T, d]`, float32 on a CPU.
        key: `[1, key heads, T, d]`.
        value: the same, of a width of their own in some models.
        row: its parts.
        scaling: of the products; None: 1 / sqrt(d).

    Returns:
        `[1, T, heads, d]`, d the values'.
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    plan = row.made.get(__name__)
    if plan is None:
        plan = row.made[__name__] = _plan(row, query.device)
    outputs = []
    if plan.short is not None:
        outputs.append(attend_in_stacks(query, key, value, plan.short, scaling))
    if plan.long:
        outputs.append(_attend(query, key, value, plan.long, scaling))
    return outputs[0] if plan.order is None else torch.cat(outputs, dim=1).index_select(1, plan.order)


def _plan(row: Row, device: torch.device) -> _Plan:
    blocks = {part: tuple(_blocks(part)) for part in row.parts}
    short = [block for own in blocks.values() for block in own if block.keys <= _KEPT]
    many = {part: tuple(block for block in own if block.keys > _KEPT) for part, own in blocks.items()}
    long = tuple((part, own) for part, own in many.items() if own)
    order = None
    if short and long:
        places = [at for own in (short, [one for _, each in long for one in each]) for at in sorted(_tokens(own))]
        order = torch.tensor(places, device=device).argsort()
    return _Plan(stacked(short, device) if short else None, long, order)


def _tokens(blocks: Iterable[Block]) -> list[int]:
    """The tokens that are queries of some blocks."""
    return [token for block in blocks for token in range(block.start, block.stop)]


class _Long(torch.autograd.Function):
    """Inside, tensors are `[key heads, T · g, d]`: the g query heads of a key head are rows behind each other."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        long: tuple[tuple[Part, tuple[Block, ...]], ...],
        scaling: float,
    ) -> torch.Tensor:
        heads = key.shape[1]
        group = query.shape[1] // heads
        rows = _rows(query, heads).mul_(scaling)
        keys, values = key[0].contiguous(), value[0].contiguous()
        outputs = []
        for part, blocks in long:
            seen, read = _seen(keys, part), _seen(values, part)
            outputs += [_weights(rows, seen, block, group) @ read[:, : block.keys] for block in blocks]
        ctx.long, ctx.scaling, ctx.group = long, scaling, group
        ctx.save_for_backward(rows, keys, values)
        return _back(torch.cat(outputs, dim=1), group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows, keys, values = ctx.saved_tensors
        group = ctx.group
        into = _rows(grads[0].transpose(1, 2), len(keys))
        to_rows, to_keys, to_values = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        at = 0
        for part, blocks in ctx.long:
            seen, read = _seen(keys, part), _seen(values, part)
            to_seen, to_read = torch.zeros_like(seen), torch.zeros_like(read)
            for block in blocks:
                own = _weights(rows, seen, block, group)
                place = slice(block.start * group, block.stop * group)
                gradient = into[:, at : at + block.queries * group]
                at += block.queries * group
                through = torch._softmax_backward_data(gradient @ read[:, : block.keys].mT, own, -1, own.dtype)
                to_rows[:, place] = through @ seen[:, : block.keys]
                to_seen[:, : block.keys] += through.mT @ rows[:, place]
                to_read[:, : block.keys] += own.mT @ gradient
            for whole, given in ((to_keys, to_seen), (to_values, to_read)):
                _give(whole, given, part)
        to_query = _back(to_rows.mul_(ctx.scaling), group).transpose(1, 2)
        return to_query, to_keys[None], to_values[None], None, None


_attend: Any = _Long.apply


def _rows(states: torch.Tensor, heads: int) -> torch.Tensor:
    """A copy of `[1, heads · g, T, d]` as `[heads, T · g, d]`."""
    _, total, length, width = states.shape
    rows = states.new_empty(heads, length, total // heads, width)
    rows.copy_(states.view(heads, -1, length, width).transpose(1, 2))
    return rows.view(heads, -1, width)


def _back(rows: torch.Tensor, group: int) -> torch.Tensor:
    """`[heads, T · g, d]` as `[1, T, heads · g, d]`."""
    heads, _, width = rows.shape
    return rows.view(heads, -1, group, width).transpose(0, 1).reshape(1, -1, heads * group, width)


def _blocks(part: Part) -> Iterator[Block]:
    """A part's queries in blocks of nearly equal size."""
    count = -(-part.length // _QUERIES)
    for at in range(count):
        first, last = (part.start + part.length * edge // count for edge in (at, at + 1))
        yield Block(first, last, (*part.before, (part.start, last)))


def _seen(states: torch.Tensor, part: Part) -> torch.Tensor:
    """What a part sees of `[heads, T, d]`."""
    own = states[:, part.start : part.stop]
    return torch.cat([*(states[:, start:stop] for start, stop in part.before), own], dim=1) if part.before else own


def _give(whole: torch.Tensor, given: torch.Tensor, part: Part) -> None:
    """Adds a gradient of `_seen` to where it was seen."""
    at = 0
    for start, stop in (*part.before, (part.start, part.stop)):
        whole[:, start:stop] += given[:, at : at + stop - start]
        at += stop - start


def _weights(rows: torch.Tensor, seen: torch.Tensor, block: Block, group: int) -> torch.Tensor:
    """The weights of attention of a block's queries, `[heads, n · g, keys]`."""
    scores = rows[:, block.start * group : block.stop * group] @ seen[:, : block.keys].mT
    if block.queries > 1:
        scores[:, :, block.keys - block.queries :] += hidden_behind(block.queries, group)
    return torch.softmax(scores, dim=-1)
