"""What generation and scoring need of a model: no dropout, no gradients, and what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module is in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not `inference_mode`: a buffer that a forward replaces (dynamic rotary frequencies) would be left
        # behind as an inference tensor, and the next training step would fail on it.
        with torch.no_grad(), _whole_rows(model.get_output_embeddings()):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _whole_rows(head: Any) -> Iterator[None]:
    """Lays out anew what the head is given.

    With `logits_to_keep` that is a slice `[B, n, width]` of every position, and PyTorch multiplies a slice of a batch
    as B products, with a copy of the head's weights for each: SmolLM2's 113 MB times the batch.
    """
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def forward_parameters(model: Any) -> frozenset[str]:
    """The arguments that the Transformers model's forward takes, below PEFT's wrapper if there is one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `[B, T]`, prompts flush right; masked positions hold a 0 that nothing reads."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def right_padded(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, flush left, where a causal model never sees the padding."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
