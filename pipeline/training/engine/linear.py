"""Linear layers that do in one pass what PEFT and autograd do in several, and whose gradients may be rounded.

A LoRA layer is y = x Wᵀ + s · (x Aᵀ) Bᵀ (Hu et al. 2021, equation 3). PEFT makes the second term as a tensor of its
own, scales it and adds it: three passes over memory as large as the layer's output, and as many in the backward pass.
Here the product that makes it also adds it. Values and gradients are PEFT's but for the order of sums.

With `rounds`, the factors of gradients are rounded to bfloat16 (dL/dx = dL/dy · W takes half of a training step's
multiplications). The forward pass is float32 all the same: loss and log-probabilities are those of the weights, to
float32's own error, and only the weights' path takes the noise, as in any bfloat16 training.

Where nothing trains, x (W + s · B A)ᵀ is one product; the sum is a tensor beside W, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn.functional import linear

from pipeline.model.anatomy import anatomy_of
from pipeline.model.device import available_memory
from pipeline.training.engine.half import Half


class _Plain(torch.autograd.Function):
    """y = x Wᵀ + b, its gradients of rounded factors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, half: Half) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.half = half
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        into = grads[0].flatten(0, -2).bfloat16()
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _through(into, ctx.half()).view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            to_weight = (into.T @ x.flatten(0, -2).bfloat16()).float()
        if ctx.needs_input_grad[2]:
            to_bias = grads[0].flatten(0, -2).sum(0)
        return to_x, to_weight, to_bias, None


class _Lora(torch.autograd.Function):
    """y = x Wᵀ + b + s · (d Aᵀ) Bᵀ of a frozen W, where d is x, or x after dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        half: Half | None,
    ) -> torch.Tensor:
        read = (x if dropped is None else dropped).flatten(0, -2)  # [T, in]
        narrow = read @ a.T  # [T, r]
        y = linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(narrow, b.T, alpha=scaling)
        ctx.save_for_backward(read, narrow, weight, a, b)
        ctx.scaling, ctx.half, ctx.apart = scaling, half, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        read, narrow, weight, a, b = ctx.saved_tensors
        into = grads[0].flatten(0, -2)  # [T, out]
        shape = (*grads[0].shape[:-1], -1)
        back = (into @ b).mul_(ctx.scaling)  # [T, r]
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = into @ weight if ctx.half is None else _through(into.bfloat16(), ctx.half())
            if not ctx.apart:
                to_x.addmm_(back, a)
            to_x = to_x.view(shape)
        if ctx.needs_input_grad[1]:
            to_dropped = (back @ a).view(shape)
        to_a = back.T @ read if ctx.needs_input_grad[4] else None
        to_b = (narrow.T @ into).T.mul_(ctx.scaling) if ctx.needs_input_grad[5] else None
        return to_x, to_dropped, None, None, to_a, to_b, None, None


_plain: Any = _Plain.apply
_lora: Any = _Lora.apply


def _through(into: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (into @ weight).float()


def join_products(model: Any, *, rounds: bool) -> None:
    """Puts these products in the place of PEFT's and torch's, in the float32 linear layers of a model's blocks.

    Forwards are replaced, and nothing else: weights, names and what is saved stay PEFT's. What PEFT's layer can do
    beyond one plain LoRA (DoRA, several adapters at once, four bits), it goes on to do itself.

    Args:
        model: the PEFT model, changed in place.
        rounds: rounds the factors of gradients to bfloat16, in layers without LoRA too.
    """
    base = model.get_base_model()
    blocks = [base.get_submodule(name) for name in anatomy_of(base).blocks]
    layers = [module for block in blocks for module in block.modules()]
    taken = {id(part) for layer in layers if isinstance(layer, LoraLayer) for part in layer.modules()}
    plain = [layer for layer in layers if _is_plain(layer) and id(layer) not in taken] if rounds else []
    wanted = sum(2 * parameter.numel() for block in blocks for parameter in block.parameters())
    kept = _has_room(wanted, base)
    for layer in filter(_is_joined, layers):
        half = Half(layer.base_layer.weight, kept=kept) if rounds else None
        layer.forward = partial(_lora_forward, layer, layer.forward, half)
    for layer in plain:
        layer.forward = partial(_plain_forward, layer, layer.forward, Half(layer.weight, kept=kept))


@contextmanager
def added_up(model: Any) -> Iterator[None]:
    """While open, what is computed without gradients multiplies with the sum of a layer's weight and its LoRA.

    The values are PEFT's but for rounding. Where a tenth of the free memory does not hold the sums, and in layers that
    `join_products` would not take, nothing changes.

    Args:
        model: the PEFT model; its adapter's weights stay as they are meanwhile. Another adapter goes PEFT's way.
    """
    layers = [layer for layer in model.modules() if _is_joined(layer) and _of_one_lora(layer) is not None]
    if not _has_room(sum(4 * layer.base_layer.weight.numel() for layer in layers), model):
        layers = []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_sum_forward, layer, layer.forward, _sum_of(layer), list(layer.active_adapters))
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _has_room(wanted: int, model: Any) -> bool:
    """Whether a tenth of the memory that is free holds so many bytes."""
    free = available_memory(next(model.parameters()).device)
    return free is not None and wanted <= free / 10


def _is_joined(layer: Any) -> bool:
    """Whether it is a LoRA layer of PEFT's plainest kind, around a plain float32 one."""
    # A fixed LoRA (`model.fixed_lora`) is a hook of the layer below, which a product of its weight would pass by.
    return type(layer) is LoraLinear and _is_plain(layer.base_layer) and not layer.base_layer._forward_hooks


def _of_one_lora(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and the scaling of a layer that adds one plain float32 LoRA; None where it does another thing."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    one = name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
    if not one or layer.disable_adapters or layer.merged or layer.lora_A[name].weight.dtype != torch.float32:
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


@torch.no_grad()
def _sum_of(layer: Any) -> torch.Tensor:
    lora = _of_one_lora(layer)
    assert lora is not None, "asked before"
    a, b, scaling = lora
    return torch.addmm(layer.base_layer.weight, b, a, alpha=scaling)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.dtype == torch.float32


def _is_float32(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def _plain_forward(layer: Any, stock: Callable[..., torch.Tensor], half: Half, x: torch.Tensor) -> torch.Tensor:
    if not _is_float32(x):
        return stock(x)
    output: torch.Tensor = _plain(x, layer.weight, layer.bias, half)
    return output


def _lora_forward(
    layer: Any,
    stock: Callable[..., torch.Tensor],
    half: Half | None,
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    base = layer.base_layer
    lora = _of_one_lora(layer)
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if args or kwargs or lora is None or trains or not _is_float32(x):
        return stock(x, *args, **kwargs)
    a, b, scaling = lora
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    dropped = dropout(x) if isinstance(dropout, nn.Dropout) and layer.training else None
    output: torch.Tensor = _lora(x, dropped, base.weight, base.bias, a, b, scaling, half)
    return output


def _sum_forward(
    layer: Any,
    stock: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    adapters: list[str],
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    trains = torch.is_grad_enabled() or layer.training
    same = layer.active_adapters == adapters and _of_one_lora(layer) is not None
    if args or kwargs or trains or not same or not _is_float32(x):
        return stock(x, *args, **kwargs)
    return linear(x, weight, layer.base_layer.bias)
