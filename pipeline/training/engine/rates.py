"""Opened weights train at a learning rate of their own."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.model.scope import is_opened


def split_learning_rates(optimizer: Any, model: torch.nn.Module, opened_rate: float) -> Any:
    """Gives the opened weights parameter groups of their own, at their own learning rate, behind the others.

    The groups' other settings stay, so weight decay still spares norms and biases.
    """
    opened = {id(parameter) for name, parameter in model.named_parameters() if is_opened(name)}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    behind = []
    for group in groups:
        theirs = [parameter for parameter in group["params"] if id(parameter) in opened]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in opened]
        if group["params"]:
            optimizer.param_groups.append(group)
        if theirs:
            behind.append({**group, "params": theirs, "lr": opened_rate})
    optimizer.param_groups.extend(behind)
    return optimizer
