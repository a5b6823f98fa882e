"""What all of some prompts begin with, computed once: a template's first lines, a system prompt.

Keys and values of those tokens are the same in every row, whatever follows them. They are computed in a row of their
own, and each row goes on from a copy.
"""

from __future__ import annotations

import copy
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
    """The first tokens of all prompts, and the model's keys and values of them."""

    length: int
    """In tokens; 0: nothing is shared."""
    _cache: Any = None

    def inputs(self, mask: torch.Tensor) -> dict[str, Any]:
        """What the model's forward takes besides the ids that follow.

        Args:
            mask: `[B, T]`, 1 for a token and 0 for padding, of what follows.

        Returns:
            The attention mask, `[B, length + T]`; where something is shared, also positions `[B, T]` and the cache.
        """
        if not self.length:
            return {"attention_mask": mask}
        whole = torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(mask))
        positions = (whole.cumsum(dim=1) - 1)[:, self.length :]
        return {"attention_mask": whole, "position_ids": positions, "past_key_values": cache}


def beginning_of(model: Any, prompts: Sequence[list[int]]) -> Beginning:
    """What all prompts begin with; at least one token of each is left to follow.

    Args:
        model: a Transformers causal language model, or a PEFT model around one, without gradients.
        prompts: token ids.
    """
    if len(prompts) < 2 or not remembers_keys_alone(model):
        return Beginning(0)
    length = min(common_prefix(min(prompts), max(prompts)), *(len(prompt) - 1 for prompt in prompts))
    if length < _WORTH:
        return Beginning(0)
    ids = torch.tensor([prompts[0][:length]], device=model.device)
    return Beginning(length, model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)


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
