"""What is computed of prompts before they are answered: their first tokens, with the keys and values of these.

What all of some prompts begin with (a template's first lines, a system prompt) has the same keys and values in every
row, whatever follows. It is computed in a row of its own, and each row goes on from a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data.tokens import common_prefix
from pipeline.evaluation.inference import forward_parameters

_WORTH = 8
"""Tokens below which another call of the model costs more than it saves."""


@dataclass(frozen=True)
class Beginning:
    """The first tokens of B prompts, as far as they are computed."""

    lengths: list[int]
    """How many of each prompt; at least one is left to follow."""
    mask: torch.Tensor
    """`[B, T]`, T the largest of `lengths`: 1 for a token and 0 for padding, flush right."""
    cache: Any = None
    """Keys and values, `[B, key heads, T, d]` a layer, to be gone on from once; None where T is 0."""


def beginning_of(model: Any, prompts: Sequence[list[int]]) -> Beginning:
    """What all prompts begin with; at least one token of each is left to follow.

    Args:
        model: a Transformers causal language model, or a PEFT model around one, without gradients.
        prompts: token ids.
    """
    length = min(common_prefix(min(prompts), max(prompts)), *(len(prompt) - 1 for prompt in prompts))
    if len(prompts) < 2 or length < _WORTH or not remembers_keys_alone(model):
        return Beginning([0] * len(prompts), torch.zeros(len(prompts), 0, dtype=torch.long, device=model.device))
    ids = torch.tensor([prompts[0][:length]], device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(prompts))
    return Beginning([length] * len(prompts), ids.new_ones(len(prompts), length), cache)


def remembers_keys_alone(model: Any) -> bool:
    """Whether every layer is full attention: a window or a recurrent state would need care with the padding."""
    config = model.config.get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        full
        and getattr(config, "sliding_window", None) is None
        and not getattr(inner, "_is_stateful", False)
        and forward_parameters(model) >= {"past_key_values", "position_ids", "logits_to_keep"}
    )
