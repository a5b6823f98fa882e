"""Packed weights: the same products, and never those of a weight that has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from pipeline.training.engine import prepacked
from pipeline.training.engine.linear import added_up
from pipeline.training.engine.precision import has_bfloat16
from pipeline.training.engine.prepacked import Packed, laid_out, pack, packs, product

IDS = torch.arange(3, 67).view(2, 32)


@pytest.fixture
def by_onednn() -> Iterator[None]:
    """float32 products by oneDNN, as `engine.precision` has them where nothing is rounded."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    backends: Any = torch.backends
    before = backends.mkldnn.matmul.fp32_precision
    backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    backends.mkldnn.matmul.fp32_precision = before


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the weight was packed, for each product."""
    seen: list[bool] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(weight.is_mkldnn)
        return product(x, weight, bias)

    for module in ("prepacked", "linear"):
        monkeypatch.setattr(f"pipeline.training.engine.{module}.product", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 50, 300])
@pytest.mark.parametrize(("out", "width"), [(48, 32), (7, 5), (1536, 576)])
def test_the_product_is_the_same(by_onednn: None, dtype: torch.dtype, rows: int, out: int, width: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)
    x = torch.randn(2, width, rows).to(dtype).mT  # not contiguous
    assert packs(weight) == (dtype == torch.float32 or has_bfloat16())
    laid = pack(weight) if packs(weight) else weight
    expected = torch.nn.functional.linear(x, weight, bias)
    apart = float((product(x, laid, bias) - expected).norm() / expected.norm())
    assert apart < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(product(x, weight, bias), expected)


def test_float32_packs_only_where_onednn_multiplies_it() -> None:
    backends: Any = torch.backends
    assert backends.mkldnn.matmul.fp32_precision != "bf16"
    assert not packs(torch.ones(2, 2))
    assert not packs(torch.ones(2, 2, device="meta"))


def test_bfloat16_packs_only_where_onednn_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONEDNN_MAX_CPU_ISA=AVX2 forbids it to a processor that has it, and packing fails."""
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    assert packs(half) == has_bfloat16()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not packs(half)


def test_a_changed_weight_is_packed_again(by_onednn: None) -> None:
    weight = torch.ones(2, 3)
    whole = Packed(weight)
    x = torch.ones(1, 3)
    assert torch.equal(product(x, whole()), torch.full((1, 2), 3.0))
    assert whole() is whole()
    weight.mul_(2)
    assert torch.equal(product(x, whole()), torch.full((1, 2), 6.0))


def test_a_model_answers_the_same_with_packed_weights(
    by_onednn: None, tiny_folder: Path, multiplied: list[bool]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    forwards = [module.forward for module in model.modules()]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with laid_out(model):
            assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
            assert multiplied == [True] * (4 * 7 + 1)  # the head too
            with torch.enable_grad():
                assert model(input_ids=IDS).logits.requires_grad
            assert len(multiplied) == 4 * 7 + 1
    assert [module.forward for module in model.modules()] == forwards


def test_what_is_not_float32_goes_its_own_way(by_onednn: None, tiny_folder: Path, multiplied: list[bool]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(input_ids=IDS).logits
        with laid_out(model):
            assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not multiplied


def test_layers_that_peft_has_wrapped_are_not_packed(by_onednn: None, tiny_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    wrapped = [module for layer in model.modules() if isinstance(layer, BaseTunerLayer) for module in layer.modules()]
    with laid_out(model):
        assert wrapped
        assert not any("forward" in module.__dict__ for module in wrapped)
        assert sum("forward" in module.__dict__ for module in model.modules()) == 4 * 5 + 1


def test_sums_of_weight_and_lora_are_packed(by_onednn: None, tiny_folder: Path, multiplied: list[bool]) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with added_up(model):
            assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-4)
            assert multiplied == [True] * (4 * 7 + 1)
            with model.disable_adapter():
                assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-2)


def test_without_room_or_onednn_nothing_changes(
    by_onednn: None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    forwards = [module.forward for module in model.modules()]
    with monkeypatch.context() as changed:
        changed.setattr(prepacked, "available_memory", lambda device: 1000)
        with laid_out(model):
            assert [module.forward for module in model.modules()] == forwards
    monkeypatch.setattr(prepacked, "packs", lambda weight: False)
    with laid_out(model):
        assert [module.forward for module in model.modules()] == forwards
