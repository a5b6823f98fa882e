from __future__ import annotations

import pytest
import torch

from pipeline.training.engine import precision
from pipeline.training.engine.precision import multiplication, product_error

CPU = torch.device("cpu")


def test_exact_keeps_the_error_of_float32_whatever_the_processor() -> None:
    with multiplication("exact", CPU) as products:
        assert product_error() < 2e-6
    assert "in float32" in products.words
    assert not products.round


def test_the_setting_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), multiplication("fast", CPU):
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("setting", ["exact", "fast"])
def test_a_processor_that_rounds_is_found_out(setting: precision.Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with AMX: the product has bfloat16's error once oneDNN is allowed it. No setting takes that for the loss."""
    monkeypatch.setattr(precision, "product_error", lambda: 2e-3)
    with multiplication(setting, CPU) as products:
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert products.words.startswith("float32 products in float32")
    assert not products.round


@pytest.mark.parametrize(("setting", "rounds"), [("exact", False), ("fast", True), ("auto", True)])
def test_gradients_are_rounded_where_the_processor_multiplies_bfloat16(
    setting: precision.Precision, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    with multiplication(setting, CPU) as products:
        assert products.round_gradients == rounds
        assert ("gradients in bfloat16" in products.words) == rounds
    with monkeypatch.context() as patched:  # ONEDNN_MAX_CPU_ISA=AVX2
        patched.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with multiplication(setting, CPU) as products:
            assert not products.round_gradients
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with multiplication(setting, CPU) as products:
        assert not products.round_gradients


def test_the_error_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of values rounded to bfloat16 first has a relative error of about 2 ** -9."""
    multiply = torch.Tensor.__matmul__

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return multiply(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert 5e-4 < product_error() < 5e-3
