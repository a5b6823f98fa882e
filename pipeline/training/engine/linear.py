"""Linear layers that do in one pass what PEFT and autograd do in several, and whose gradients may be rounded.

A LoRA layer is y = x Wᵀ + s · (x Aᵀ) Bᵀ (Hu et al. 2021, equation 3). PEFT makes the second term as a tensor of its
own, scales it and adds it: three passes over memory as large as the layer's output, and as many in the backward pass.
Here the product that makes it also adds it, and layers that read the same x have their A's multiplied with it at once:
these products are so thin that their calls cost what their numbers do. Values and gradients are PEFT's but for the
order of sums.

With `rounds`, the factors of gradients are rounded to bfloat16 (dL/dx = dL/dy · W takes half of a training step's
multiplications). The forward pass is float32 all the same: loss and log-probabilities are those of the weights, to
float32's own error, and only the weights' path takes the noise, as in any bfloat16 training. What is kept for A's
gradient is rounded already, in half of the memory.

Where nothing trains, x (W + s · B A)ᵀ is one product; the sum is a tensor beside W, which stays as it is (`prepacked`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn.functional import linear

from pipeline.model.anatomy import anatomy_of
from pipeline.training.engine.half import Half
from pipeline.training.engine.prepacked import has_room, laid_out, pack, packs, product, replaced

_READ_ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same x where they have one parent, as Transformers' models name them."""


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
            to_x = ctx.half.through(into).view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            to_weight = (into.T @ x.flatten(0, -2).bfloat16()).float()
        if ctx.needs_input_grad[2]:
            to_bias = grads[0].flatten(0, -2).sum(0)
        return to_x, to_weight, to_bias, None


class _Below(NamedTuple):
    """The frozen layers below LoRAs that read the same x."""

    weights: tuple[torch.Tensor, ...]
    """`[out, in]` each."""
    biases: tuple[torch.Tensor | None, ...]
    scalings: tuple[float, ...]
    """What each LoRA's product is multiplied with."""
    half: Half | None
    """All the weights as one; None: gradients are not rounded."""


class _Lora(torch.autograd.Function):
    """y = x Wᵀ + b + s · (d Aᵀ) Bᵀ of each frozen W, where d is x, or x after dropout.

    All A's are one product with x, forward and backward, and so are the rounded W's with the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropped: torch.Tensor | None, below: _Below, *loras: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(below.weights)
        a, bs = _joined(loras[:count]), loras[count:]  # [R, in], R the ranks of all; [out, r] each
        read = (x if dropped is None else dropped).flatten(0, -2)  # [T, in]
        narrow = read @ a.T  # [T, R]
        outputs = []
        for weight, bias, scaling, b, own in zip(*below[:3], bs, _by_rank(narrow, bs), strict=True):
            y = linear(x, weight, bias)
            y.view(-1, y.shape[-1]).addmm_(own, b.T, alpha=scaling)
            outputs.append(y)
        ctx.save_for_backward(read if below.half is None else read.bfloat16(), narrow, *loras)
        ctx.below, ctx.apart = below, dropped is not None
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        read, narrow, *loras = ctx.saved_tensors
        below: _Below = ctx.below
        count = len(grads)
        a, bs = _joined(loras[:count]), loras[count:]
        intos = [grad.flatten(0, -2) for grad in grads]  # [T, out] each
        shape = (*grads[0].shape[:-1], -1)
        backs = [(into @ b).mul_(scaling) for into, b, scaling in zip(intos, bs, below.scalings, strict=True)]
        back = _joined(backs, dim=1)  # [T, R]
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = _to_input(intos, below)
            if not ctx.apart:
                to_x.addmm_(back, a)
            to_x = to_x.view(shape)
        if ctx.needs_input_grad[1]:
            to_dropped = (back @ a).view(shape)
        to_loras: list[torch.Tensor | None] = [None] * len(loras)
        if any(ctx.needs_input_grad[3:]):
            to_a = (back.to(read.dtype).T @ read).float()
            to_loras[:count] = torch.split(to_a, [b.shape[1] for b in bs])
            to_loras[count:] = [
                (own.T @ into).T.mul_(scaling)
                for own, into, scaling in zip(_by_rank(narrow, bs), intos, below.scalings, strict=True)
            ]
        return to_x, to_dropped, None, *to_loras


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _by_rank(narrow: torch.Tensor, bs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The columns of `[T, R]` that are each LoRA's own."""
    return torch.split(narrow, [b.shape[1] for b in bs], dim=1)


def _to_input(intos: Sequence[torch.Tensor], below: _Below) -> torch.Tensor:
    """What goes back through the frozen weights, `[T, in]`."""
    if below.half is not None:
        return below.half.through(_joined([into.bfloat16() for into in intos], dim=1))
    to_x = intos[0] @ below.weights[0]
    for into, weight in zip(intos[1:], below.weights[1:], strict=True):
        to_x.addmm_(into, weight)
    return to_x


_plain: Any = _Plain.apply
_lora: Any = _Lora.apply


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
    kept = has_room(wanted, _device_of(base))
    for layer in plain:
        layer.forward = partial(_plain_forward, layer, layer.forward, Half([layer.weight], kept=kept))

    def half_of(layers: Sequence[Any]) -> Half | None:
        return Half([layer.base_layer.weight for layer in layers], kept=kept) if rounds else None

    for parent in (module for block in blocks for module in block.modules()):
        for siblings in _siblings(parent):
            _Siblings(parent, siblings, half_of)


@contextmanager
def added_up(model: Any) -> Iterator[None]:
    """While open, what is computed without gradients multiplies with the sum of a layer's weight and its LoRA.

    The values are PEFT's but for rounding. Where a tenth of the free memory does not hold the sums, and in layers that
    `join_products` would not take, nothing changes. Layers without LoRA are `laid_out`.

    Args:
        model: the PEFT model; its adapter's weights stay as they are meanwhile. Another adapter goes PEFT's way.
    """
    layers = [layer for layer in model.modules() if _is_joined(layer) and _of_one_lora(layer) is not None]
    if not has_room(sum(4 * layer.base_layer.weight.numel() for layer in layers), _device_of(model)):
        layers = []

    def with_sum(layer: Any) -> Callable[..., torch.Tensor]:
        return partial(_sum_forward, layer, layer.forward, _sum_of(layer), list(layer.active_adapters))

    with laid_out(model), replaced(layers, with_sum):
        yield


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _siblings(parent: nn.Module) -> list[list[Any]]:
    """A module's LoRA layers, those together that read the same."""
    layers = {name: layer for name, layer in parent.named_children() if _is_joined(layer)}
    together = [[layers.pop(name) for name in names if name in layers] for names in _READ_ALIKE]
    return [some for some in (*together, *([layer] for layer in layers.values())) if some]


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
    total = torch.addmm(layer.base_layer.weight, b, a, alpha=scaling)
    return pack(total) if packs(total) else total


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.dtype == torch.float32


def _is_float32(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def _plain_forward(layer: Any, stock: Callable[..., torch.Tensor], half: Half, x: torch.Tensor) -> torch.Tensor:
    if not _is_float32(x):
        return stock(x)
    output: torch.Tensor = _plain(x, layer.weight, layer.bias, half)
    return output


class _Siblings:
    """LoRA layers that read the same x: the one that is asked first computes for all, and the others take theirs.

    Where one does not come for its own, they read something else, and each computes by itself from then on. Nothing
    waits longer than a forward of their parent, even one that fails: an output holds all that it was computed from.

    Args:
        parent: the module whose forward asks them.
        layers: of `_is_joined`; their forwards are replaced.
        half_of: makes what the gradients of some layers' outputs are multiplied with.
    """

    def __init__(
        self, parent: nn.Module, layers: Sequence[Any], half_of: Callable[[Sequence[Any]], Half | None]
    ) -> None:
        self._layers = layers
        self._half = half_of(layers)
        self._halves = [half_of([layer]) for layer in layers]
        self._together = len(layers) > 1
        self._read: tuple[torch.Tensor, int, bool] | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        for at, layer in enumerate(layers):
            layer.forward = partial(self._forward, at, layer.forward)
        if self._together:
            # The parent outlives its LoRA layers.
            parent.register_forward_hook(partial(_end, weakref.ref(self)), always_call=True)

    def end(self, *, failed: bool) -> None:
        """Lets go of what waits, at the end of the parent's forward."""
        self._together &= failed or not self._waiting
        self._waiting, self._read = {}, None

    def _forward(
        self, at: int, stock: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if args or kwargs or not _is_float32(x):
            return stock(x, *args, **kwargs)
        if not (at in self._waiting and self._has_read(x)):
            self._together &= not self._waiting
            self._waiting = self._computed(x) if self._together else {}
            self._read = (x, x._version, torch.is_grad_enabled())
        own = self._waiting.pop(at, None)
        if not self._waiting:
            self._read = None
        if own is None:
            outputs = _outputs(x, [self._layers[at]], self._halves[at])
            own = stock(x) if outputs is None else outputs[0]
        return own

    def _computed(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """The outputs of all layers; nothing where they are not of one kind."""
        return dict(enumerate(_outputs(x, self._layers, self._half) or ()))

    def _has_read(self, x: torch.Tensor) -> bool:
        before, version, gradients = self._read or (None, 0, False)
        return before is x and (version, gradients) == (x._version, torch.is_grad_enabled())


def _end(siblings: weakref.ref[_Siblings], parent: nn.Module, args: Any, output: Any) -> None:
    own = siblings()
    if own is not None:
        own.end(failed=output is None)


def _outputs(x: torch.Tensor, layers: Sequence[Any], half: Half | None) -> tuple[torch.Tensor, ...] | None:
    """What LoRA layers give for x; None where PEFT has to compute it, or where each of several drops its own."""
    loras = [lora for layer in layers if (lora := _of_one_lora(layer)) is not None]
    if len(loras) < len(layers) or any(_trains(layer.base_layer) for layer in layers):
        return None
    dropouts = [layer.lora_dropout[layer.active_adapters[0]] for layer in layers if layer.training]
    drops = [dropout for dropout in dropouts if isinstance(dropout, nn.Dropout)]
    if drops and len(layers) > 1:
        return None
    a, b, scalings = zip(*loras, strict=True)
    weights, biases = zip(*((layer.base_layer.weight, layer.base_layer.bias) for layer in layers), strict=True)
    below = _Below(weights, biases, scalings, half)
    outputs: tuple[torch.Tensor, ...] = _lora(x, drops[0](x) if drops else None, below, *a, *b)
    return outputs


def _trains(layer: Any) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


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
    return product(x, weight, layer.base_layer.bias)
