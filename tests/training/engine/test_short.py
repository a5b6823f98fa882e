"""Attention of short parts by plain products: SDPA's values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.training.engine import short
from pipeline.training.engine.short import NAME, attend, attending_by_products

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
        if mask is not None or length == keys or length > 1
    ],
)
def test_values_and_gradients_are_sdpa_s(
    length: int, keys: int, scaling: float | None, mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = None if mask is None else masks(length, keys)[mask]

    def result(shown: torch.Tensor | None = chosen) -> list[torch.Tensor]:
        tensors = parts(length, keys)
        output = attend(LAYER, *tensors, shown, scaling=scaling, dropout=0.0, sliding_window=5)
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        return [output, *gradients]

    ours = [result()]
    monkeypatch.setattr(short, "_SCORES", 0)
    ours.append(result())
    stock = result(masks(length, keys)["causal" if mask is None else mask])  # SDPA with a mask in so many words
    for mine in ours:
        for one, other in zip(mine, stock, strict=True):
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


def test_padded_batches_are_answered_as_by_sdpa(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding in front, which sees nothing, and then one token behind what is remembered."""
    calls = []
    products = short._products
    monkeypatch.setattr(short, "_products", lambda *given: (calls.append(given[0].shape[2]), products(*given))[1])
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :1] = 0, 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    @torch.no_grad()
    def answered() -> list[torch.Tensor]:
        first = chat_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        longer = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        more = chat_model(
            input_ids=ids[:, :1],
            attention_mask=longer,
            position_ids=positions[:, -1:] + 1,
            past_key_values=first.past_key_values,
        )
        return [first.logits[mask.bool()], more.logits]

    stock = answered()
    assert not calls
    with attending_by_products(chat_model):
        assert chat_model.config._attn_implementation == NAME
        ours = answered()
    assert chat_model.config._attn_implementation == "sdpa"
    layers = chat_model.config.num_hidden_layers
    assert calls == [9] * layers + [1] * layers
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
