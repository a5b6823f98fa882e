"""The parts of a causal language model, found from the model itself rather than from names.

Llama calls its last norm `model.norm`, GPT-2 `transformer.ln_f`, GPT-NeoX `gpt_neox.final_layer_norm`: what they
share is a decoder with one list of blocks as long as the configuration says, a norm behind it, and a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Anatomy:
    """Full module names, as `named_modules` of the causal language model gives them."""

    blocks: tuple[str, ...]
    """The transformer blocks, from the embeddings up."""
    final_norm: str | None
    head: str | None
    head_is_tied: bool
    """Whether the head shares its weight with the input embeddings."""


def anatomy_of(model: Any) -> Anatomy:
    """The blocks, the final norm and the head of a Transformers causal language model.

    Raises:
        PipelineError: no list of blocks of the length that the configuration states.
    """
    names = {id(module): name for name, module in model.named_modules()}
    depth = model.config.get_text_config().num_hidden_layers
    owner = next(
        (
            (parent, child)
            for parent in model.get_decoder().modules()  # a vision tower may have as many blocks
            for child in parent.children()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ),
        None,
    )
    if owner is None:
        raise PipelineError(
            f"{type(model).__name__} has no list of {depth} blocks, so its layers cannot be told apart",
            code="unknown-architecture",
            pointer="/model/id",
            mend="use `layers: all`, open no blocks, and report the architecture",
        )
    parent, blocks = owner
    siblings = list(parent.named_children())
    after = [sibling for _, sibling in siblings].index(blocks) + 1
    norms = [
        sibling
        for at, (name, sibling) in enumerate(siblings)
        # OPT registers its final norm before its blocks, where BLOOM has the norm of its embeddings: a name decides.
        if (at >= after or "final" in name)
        and "norm" in type(sibling).__name__.lower()
        and any(True for _ in sibling.parameters())
    ]
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    return Anatomy(
        blocks=tuple(names[id(block)] for block in blocks),
        final_norm=names[id(norms[-1])] if norms else None,
        head=None if head is None else names[id(head)],
        head_is_tied=head is not None and head.weight is embeddings.weight,
    )


def linear_layers(model: nn.Module, block: str) -> list[str]:
    """Names within `block` of its linear layers, e.g. `self_attn.q_proj` (GPT-2's Conv1D counts as one)."""
    from transformers.pytorch_utils import Conv1D

    return [
        name for name, module in model.get_submodule(block).named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
