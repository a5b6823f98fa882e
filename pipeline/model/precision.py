"""Which weights are held in which precision: what is opened in float32, also where the base is in four bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_quantized(model: nn.Module) -> bool:
    """Whether a module holds 4-bit weights."""
    return any(hasattr(parameter, "quant_state") for parameter in model.parameters())


def hold_in_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Casts modules to float32 in place, before PEFT copies them.

    A step of 5e-6 is lost in bfloat16's eight bits of mantissa; PEFT raises LoRA weights to float32 by itself, but
    not `modules_to_save`.
    """
    for name in names:
        dequantize(model, [name])
        model.get_submodule(name).to(torch.float32)


def dequantize(model: nn.Module, names: Iterable[str]) -> None:
    """Puts plain layers in place of 4-bit ones within modules, with the very weights that those compute with.

    Args:
        model: changed in place.
        names: of modules, `""` for all of the model.
    """
    for name in names:
        packed = [
            (f"{name}.{inner}".strip("."), layer)
            for inner, layer in model.get_submodule(name).named_modules()
            if hasattr(getattr(layer, "weight", None), "quant_state")
        ]
        for full, layer in packed:
            parent, _, leaf = full.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _plain(layer))


def _plain(layer: Any) -> nn.Module:
    """The layer that bitsandbytes' `Linear4bit` stands for, in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    plain: Any
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)  # [out, in]
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    if getattr(layer, "source_cls", nn.Linear) is Conv1D:  # GPT-2's: its weight is [in, out]
        plain, weight = Conv1D(layer.out_features, layer.in_features), weight.t().contiguous()
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(torch.float32), requires_grad=False)
    module: nn.Module = plain.train(layer.training)
    return module


def keep_gradients(base: nn.Module) -> None:
    """Keeps bitsandbytes (0.50) from laying 4-bit weights out anew in the first forward in evaluation mode.

    It does so on CPUs with AVX-512 BF16, for a kernel without a backward pass: a model that was scored and then trains
    would lose, silently, the gradients of all that lies below its first 4-bit layer.
    """
    layer: Any
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


@contextmanager
def as_it_trains(policy: nn.Module) -> Iterator[None]:
    """Keeps the precision of what trains while TRL builds a trainer around `policy`.

    On a quantised base TRL casts every trainable weight to bfloat16, after it has copied the reference: opened weights
    would lose their steps, and policy and reference would differ from the start.
    """
    held = [(parameter, parameter.data) for parameter in policy.parameters() if parameter.requires_grad]
    yield
    for parameter, data in held:
        parameter.data = data
