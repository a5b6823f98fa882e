"""Prompts that were computed when something behind them was scored: answers to them begin from their keys and values.

A prompt is found by its token ids. What does not fit into a share of the free memory is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.evaluation.beginning import Beginning
from pipeline.evaluation.inference import left_padded
from pipeline.model.device import available_memory

_SHARE = 10
"""A tenth of the free memory."""

_Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, `[key heads, T, d]`."""


class KnownPrompts:
    """Keys and values of prompts under one set of weights.

    Args:
        device: the model's, whose free memory bounds what is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._room = (available_memory(device) or 0) // _SHARE
        self._found: dict[tuple[int, ...], tuple[list[_Layer], torch.Tensor]] = {}

    @property
    def keeps(self) -> bool:
        """Whether there is room; none is left once something did not fit."""
        return self._room > 0

    def add(self, cache: Any, prompts: Sequence[list[int]], places: Sequence[torch.Tensor]) -> None:
        """Keeps what a model computed of prompts that stand in one row.

        Args:
            cache: the model's, with the keys and values of the row.
            prompts: token ids.
            places: where in the row each prompt's tokens are.
        """
        layers = getattr(cache, "layers", [])
        if not layers or any(type(layer) is not DynamicLayer for layer in layers):
            self._room = 0
            return
        kept = torch.tensor(sorted(set(torch.cat(list(places)).tolist())), device=layers[0].keys.device)
        size = sum(layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes for layer in layers) * len(kept)
        if size > self._room:
            self._room = 0
            return
        self._room -= size
        row = [(layer.keys[0][:, kept], layer.values[0][:, kept]) for layer in layers]
        for prompt, own in zip(prompts, places, strict=True):
            self._found[tuple(prompt)] = row, torch.searchsorted(kept, own[:-1])

    def beginning(self, prompts: Sequence[list[int]]) -> Beginning | None:
        """All of each prompt but its last token; None where one of them is not known.

        Args:
            prompts: token ids, none of them empty.
        """
        found = [self._found.get(tuple(prompt)) for prompt in prompts]
        known = [one for one in found if one is not None]
        longest = max(len(prompt) - 1 for prompt in prompts)
        if len(known) < len(prompts) or not longest:
            return None
        cache = DynamicCache()
        for layer in range(len(known[0][0])):
            keys, values = (
                _left_padded([row[layer][side][:, places] for row, places in known], longest) for side in (0, 1)
            )
            cache.update(keys, values, layer)
        mask = left_padded([prompt[:-1] for prompt in prompts], keys.device)[1]
        return Beginning([len(prompt) - 1 for prompt in prompts], mask, cache)


def _left_padded(states: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """`[B, heads, length, d]` of each `[heads, n, d]`."""
    heads, _, width = states[0].shape
    padded = states[0].new_zeros(len(states), heads, length, width)
    for row, own in zip(padded, states, strict=True):
        row[:, length - own.shape[1] :] = own
    return padded
