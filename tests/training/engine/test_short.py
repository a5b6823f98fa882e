"""Attention of short parts by plain products: SDPA's values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.training.engine import short
from pipeline.training.engine.short import attend

LAYER: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def parts(length: int, keys: int) -> list[torch.Tensor]:
    """Queries of four heads, keys and values of two, laid out as a layer's projections lay them out."""
    torch.manual_seed(0)
    shapes = ((length, 4), (keys, 2), (keys, 2))
    return [torch.randn(1, tokens, heads, 8).transpose(1, 2).requires_grad_() for tokens, heads in shapes]


def masks(length: int, keys: int) -> dict[str, torch.Tensor]:
    at = torch.arange(keys - length, keys)[:, None]
    seen = torch.arange(keys)[None, :]
    causal, window = (seen <= at)[None, None], ((seen <= at) & (seen > at - 5))[None, None]
    added = torch.zeros(causal.shape).masked_fill(~causal, float("-inf"))
    return {"causal": causal, "window": window, "added": added}


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize(
    ("length", "keys", "mask"),
    [
        (length, keys, mask)
        for length, keys in ((1, 1), (12, 12), (7, 20))
        for mask in (None, "causal", "window", "added")
        if mask is not None or length == keys
    ],
)
def test_values_and_gradients_are_sdpa_s(
    length: int, keys: int, scaling: float | None, mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = None if mask is None else masks(length, keys)[mask]

    def result() -> list[torch.Tensor]:
        tensors = parts(length, keys)
        output = attend(LAYER, *tensors, chosen, scaling=scaling, dropout=0.0, sliding_window=5)
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        return [output, *gradients]

    ours = result()
    monkeypatch.setattr(short, "_SCORES", 0)
    for one, other in zip(ours, result(), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "tokens", "by_products"),
    [
        ({}, 256, True),
        ({}, 257, False),
        ({"dropout": 0.1}, 8, False),
        ({"position_bias": torch.zeros(1, 1, 8, 8)}, 8, False),
        ({"is_causal": False}, 8, False),
        ({"num_items_in_batch": 3}, 8, True),
    ],
)
def test_what_is_long_or_more_goes_to_sdpa(
    changes: dict[str, Any], tokens: int, by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stock(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(short, "sdpa_attention_forward", stock)
    attend(LAYER, *parts(tokens, tokens), None, **changes)
    assert bool(calls) != by_products
