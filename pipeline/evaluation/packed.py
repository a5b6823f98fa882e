"""Completions scored without padding, on the joint row that DPO trains on: prompts once, a common beginning once.

A completion by itself is a pair of two equal rows there: all of it is shared. The head is run on what predicts a
completion's tokens and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.data.tokens import Completion
from pipeline.evaluation.beginning import remembers_keys_alone
from pipeline.evaluation.inference import right_padded
from pipeline.evaluation.known_prompts import KnownPrompts
from pipeline.training.engine import short
from pipeline.training.engine.attention import NAME
from pipeline.training.engine.joint import Joint, join

_READS = ("sdpa", short.NAME)
"""Attention in whose place the joint row's own can be put."""


@contextmanager
def packing(model: Any) -> Iterator[bool]:
    """While open, a model reads joint rows; gives whether it can, as far as its configuration tells.

    Args:
        model: a Transformers causal language model, or a PEFT model around one.
    """
    if not remembers_keys_alone(model):
        yield False
        return
    with short.attending(model, NAME, _READS) as can:
        yield can


def packed_logits(
    model: Any, rows: Sequence[tuple[Completion, ...]], known: KnownPrompts | None = None
) -> list[torch.Tensor] | None:
    """What each scored token is predicted from, while `packing` is open.

    Args:
        model: see `packing`; without gradients.
        rows: completions by themselves, or two behind one prompt; with it, one of them has two tokens at least.
        known: keeps the keys and values of the prompts, as long as there is room.

    Returns:
        Logits `[n, V]` of the n scored tokens of each completion, in the model's precision, first of all rows' first
        completions, then of their second ones; None where some layer did not read the row.
    """
    completions = [completion for side in (0, -1) for completion in (row[side] for row in rows)]
    sequences = [completion.prompt_ids + completion.completion_ids for completion in completions]
    joint = join(*right_padded(sequences, model.device))
    source = joint.source.view(len(sequences), -1)
    places = [
        source[at, max(len(completion.prompt_ids), 1) - 1 : len(sequence) - 1]
        for at, (completion, sequence) in enumerate(zip(completions, sequences, strict=True))
    ]
    asked = places[: len(rows) * len(rows[0])]
    output = _read(model, joint, torch.cat(asked), use_cache=known is not None and known.keeps)
    if output is None:
        return None
    if known is not None and known.keeps:
        prompts = [row[0].prompt_ids for row in rows]
        known.add(
            output.past_key_values,
            prompts,
            [own[: len(prompt)] for own, prompt in zip(source, prompts, strict=False)],
        )
    return list(torch.split(output.logits[0], [len(place) for place in asked]))


def _read(model: Any, joint: Joint, places: torch.Tensor, *, use_cache: bool) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = inner(
        input_ids=joint.input_ids,
        position_ids=joint.position_ids,
        # Four dimensions: passed on as it is, by models with one mask and with one for each type of layer.
        attention_mask=joint.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        use_cache=use_cache,
        logits_to_keep=places,
        joint=joint,
    )
    return output if joint.layers == inner.config.get_text_config().num_hidden_layers else None
