"""A LoRA that no longer trains, as a part of the layer under it.

Where DPO trains a new adapter, or opened weights alone, what SFT added belongs to policy and reference alike. Folded
into the layer's weight it would be rounded to the base's precision (bfloat16, or four bits); as factors beside the
weight it is exact in every one. The same form takes back what an initialisation such as PiSSA puts into an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NAME = "fixed"


class FixedLora(nn.Module):
    """Adds `up @ down @ x` to the output of a layer, without gradients of its own.

    Args:
        down: `[r, in]`, LoRA's A.
        up: `[out, r]`, LoRA's B times its scaling.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """As a forward hook of `layer`."""
        states = inputs[0].to(self.down.dtype)
        added = nn.functional.linear(nn.functional.linear(states, self.down), self.up)
        return output + added.to(output.dtype)


def fix(layer: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
    """Makes a LoRA a part of `layer`, beside any that is one already; `FixedLora` says the shapes."""
    fixed = getattr(layer, _NAME, None)
    if fixed is None:
        fixed = FixedLora(down, up)
        layer.add_module(_NAME, fixed)
        layer.register_forward_hook(fixed)
        return
    fixed.down.data = torch.cat([fixed.down.data, down])
    fixed.up.data = torch.cat([fixed.up.data, up], dim=1)


def fixed_loras(model: nn.Module) -> dict[str, FixedLora]:
    """Every fixed LoRA of a model, by the full name of its layer."""
    suffix = f".{_NAME}"
    return {
        name.removesuffix(suffix): module for name, module in model.named_modules() if isinstance(module, FixedLora)
    }


def factors_of(layer: Any, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """What an adapter adds to a LoRA layer of PEFT: copies of A `[r, in]` and of scaling times B `[out, r]`."""
    down = layer.lora_A[adapter].weight.detach().clone()
    return down, layer.scaling[adapter] * layer.lora_B[adapter].weight.detach()
