"""RMS norms in fewer passes: values and gradients are those of Transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pipeline.training.engine import norms
from pipeline.training.engine.norms import join_norms


def build(kind: type[torch.nn.Module] = LlamaRMSNorm) -> Any:
    """A norm of width 48 whose weight is frozen, and is not 1 everywhere."""
    layer: Any = kind(48, eps=1e-5)
    layer.weight.requires_grad_(False).copy_(torch.linspace(-2, 2, 48))
    return layer


def replaced(layer: torch.nn.Module) -> bool:
    return "forward" in layer.__dict__


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1, 1e4])
@pytest.mark.parametrize("shape", [(1, 7, 48), (2, 3, 5, 48)])
def test_values_and_gradients_are_those_of_transformers(
    kind: type[torch.nn.Module], size: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = build(kind)
    stock = copy.deepcopy(layer).double()
    join_norms(layer)
    assert replaced(layer)
    x, into = size * torch.randn(shape), torch.randn(shape)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    output, expected = layer(ours), stock(exact)
    assert output.dtype == torch.float32
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-6)
    output.backward(into)
    expected.backward(into.double())
    assert ours.grad is not None
    assert exact.grad is not None
    assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 1e-6


def test_the_gradient_is_the_derivative() -> None:
    weight = torch.randn(6, dtype=torch.double)
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norms._normed(x, weight, 1e-5), x)


class GatedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """One that takes more than a row."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = super().forward(x) * gate.sigmoid()
        return gated


@pytest.mark.parametrize("kind", [Gemma3RMSNorm, GatedRMSNorm, torch.nn.LayerNorm])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_another_norm_is_left_alone(kind: type[torch.nn.Module], weight: float) -> None:
    layer: Any = kind(48, eps=1e-5)
    layer.weight.requires_grad_(False).fill_(weight)
    join_norms(layer)
    assert not replaced(layer)


def test_a_weight_that_trains_gets_its_gradient() -> None:
    layer = build()
    join_norms(layer)
    layer.weight.requires_grad_(True)
    layer(torch.randn(3, 48)).sum().backward()
    assert layer.weight.grad is not None


def test_half_precision_and_autocast_go_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build()
    join_norms(layer)
    monkeypatch.setattr(norms, "_normed", None)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, 48))
    assert layer(torch.randn(3, 48, dtype=torch.bfloat16)).dtype == torch.float32
    half = build().bfloat16()
    join_norms(half)
    assert not replaced(half)


def test_a_model_computes_the_same_with_it(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    stock = copy.deepcopy(model)
    state = torch.get_rng_state()
    join_norms(model)
    join_norms(model)
    assert torch.equal(torch.get_rng_state(), state)
    calls: list[int] = []
    ours = norms._normed
    monkeypatch.setattr(norms, "_normed", lambda *args: calls.append(1) or ours(*args))  # type: ignore[func-returns-value]
    ids = torch.arange(3, 67).view(2, 32)
    for each in (model, stock):
        each(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2 * 4 + 1  # two of each block, and the last
    own, other = (each.get_input_embeddings().weight.grad for each in (model, stock))
    assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)
