"""Attention over the parts of a row: SDPA's values and gradients, with a mask in so many words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.training.engine import blocks, stacks
from pipeline.training.engine.blocks import attend_in_blocks, takes
from pipeline.training.engine.parts import Part, Row

LAYER: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
LAYOUTS = {
    "one row": [Part(0, 17)],
    "one token": [Part(0, 1)],
    "rows": [Part(0, 5), Part(5, 6), Part(6, 19)],
    "rows behind a front": [Part(0, 4), Part(4, 11, ((0, 4),)), Part(11, 12, ((0, 4),))],
    "pairs": [
        Part(0, 3),
        Part(3, 9, ((0, 3),)),
        Part(9, 16, ((0, 3), (3, 9))),
        Part(16, 16, ((0, 3), (3, 9))),  # a rejected completion that is over before it differs
        Part(16, 18, ((0, 3),)),
        Part(18, 19, ((0, 3), (16, 18))),
        Part(19, 26, ((0, 3), (16, 18))),
    ],
}


def tensors(length: int) -> list[torch.Tensor]:
    """Queries of four heads, keys and values of two, laid out as a layer's projections lay them out."""
    torch.manual_seed(0)
    shapes = ((4, 8), (2, 8), (2, 6))
    return [torch.randn(1, length, heads, width).transpose(1, 2).requires_grad_() for heads, width in shapes]


def allowed(parts: list[Part]) -> torch.Tensor:
    """`[1, 1, T, T]`: what each token of the parts sees."""
    seen = torch.zeros(parts[-1].stop, parts[-1].stop, dtype=torch.bool)
    for part in parts:
        for at in range(part.start, part.stop):
            for start, stop in (*part.before, (part.start, at + 1)):
                seen[at, start:stop] = True
    return seen[None, None]


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("queries", "kept"), [(128, 256), (4, 256), (4, 6), (4, 0)])
def test_values_and_gradients_are_sdpas(
    layout: str, scaling: float | None, queries: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_QUERIES", queries)
    monkeypatch.setattr(blocks, "_KEPT", kept)
    parts = LAYOUTS[layout]
    length = parts[-1].stop

    def gradients(output: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
        weights = torch.arange(output.numel()).view(output.shape).cos()
        return [output, *torch.autograd.grad((output * weights).sum(), given)]

    given = tensors(length)
    own = gradients(attend_in_blocks(given[0], given[1], given[2], Row(parts), scaling), given)
    given = tensors(length)
    stock = gradients(sdpa_attention_forward(LAYER, *given, allowed(parts), scaling=scaling)[0], given)
    for one, other in zip(own, stock, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


def test_what_no_token_saw_gives_no_gradient_to_it() -> None:
    given = tensors(9)
    output = attend_in_blocks(given[0], given[1], given[2], Row([Part(0, 4), Part(4, 9)]), None)
    gradients = torch.autograd.grad(output[:, :4].sum(), given)
    assert all(not gradient[:, :, 4:].any() and gradient[:, :, :4].any() for gradient in gradients[2:])


def test_without_gradients_the_values_are_the_same_bits() -> None:
    given = tensors(26)
    with_gradient = attend_in_blocks(given[0], given[1], given[2], Row(LAYOUTS["pairs"]), None)
    with torch.no_grad():
        assert torch.equal(with_gradient, attend_in_blocks(given[0], given[1], given[2], Row(LAYOUTS["pairs"]), None))


@pytest.mark.parametrize(
    ("window", "more", "taken"),
    [
        (None, {}, True),
        (8, {}, False),
        (None, {"dropout": 0.1}, False),
        (None, {"softcap": 30.0}, False),
        (None, {"is_causal": False}, False),
    ],
)
def test_a_layer_that_asks_for_more_is_left_to_sdpa(window: int | None, more: dict[str, Any], taken: bool) -> None:
    query = tensors(4)[0]
    assert takes(LAYER, query, window, **more) == taken
    assert not takes(LAYER, query.bfloat16(), window, **more)


def test_blocks_of_about_one_size_are_stacked_and_others_are_not() -> None:
    rows = [Part(0, 40), Part(40, 90), Part(90, 96), Part(96, 296)]
    plan = blocks._plan(Row(rows), torch.device("cpu"))
    assert plan.short is not None
    shapes = [tuple(stack.hidden.shape) for stack in plan.short.stacks]
    assert shapes == [(1, 1, 100, 1, 200), (1, 1, 100, 1, 100), (3, 1, 50, 1, 50)]  # the last holds 50, 40 and 6
    assert [len(stack.filled) for stack in plan.short.stacks] == [0, 0, 10 + 44]
    assert plan.order is None
    assert plan.short.tokens.tolist() == list(range(296))


def test_a_row_is_planned_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(LAYOUTS["pairs"])
    given = tensors(26)
    first = attend_in_blocks(given[0], given[1], given[2], row, None)
    monkeypatch.setattr(blocks, "_plan", None)
    assert torch.equal(attend_in_blocks(given[0], given[1], given[2], row, None), first)


def test_what_is_filled_in_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 stands for what is filled in: its numbers and its gradient are in no part but its own."""
    results = []
    for filled, count in ((10**6, 1), (-(10**6), 3)):
        monkeypatch.setattr(stacks, "_FILLED", filled)
        row = Row([Part(0, 3), Part(3, 20), Part(20, 24)])
        given = tensors(24)
        for states in given:
            states.data[:, :, 0] = 10.0
        output = attend_in_blocks(given[0], given[1], given[2], row, None)
        assert len(row.made[blocks.__name__].short.stacks) == count
        weights = torch.arange(output.numel()).view(output.shape).cos() + 1
        results.append([output, *torch.autograd.grad((output * weights).sum(), given)])
    for together, alone in zip(*results, strict=True):
        assert torch.allclose(together, alone, atol=1e-5)
