"""The head on the positions in the loss alone, on every device.

TRL's fused head scores only the positions whose label counts, but only where Triton runs; on the CPU and on MPS it
projects prompt and padding as well, half of all work for a small model with a large vocabulary. Its own compact
path needs no Triton: the kernel falls back to plain tensor operations by itself.

Those make about twenty passes over a tile of logits, which TRL cuts for a GPU: 4,096 tokens by 32,768 words are half a
gigabyte. On a CPU a tile of 128 tokens stays in the processor's cache: for 1,400 tokens of SmolLM2, forward and
backward took 3.3 s with TRL's tiles and 2.0 s with these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import trl.trainer.utils as trl_utils
from trl.kernels import chunked_logprob

_CPU_TOKENS = 128
"""Tokens in a tile of logits: 64 and 256 were slower on an AMD Zen 4."""


@contextmanager
def compact_head(device: torch.device) -> Iterator[None]:
    """While open, TRL's fused heads take their compact path, on a CPU in small tiles.

    `trl.trainer.utils._use_triton` is asked by `add_fused_lm_head` for that choice and for nothing else (TRL 1.16);
    the kernel module asks its own.

    Args:
        device: where the model is.
    """
    before = trl_utils._use_triton, chunked_logprob.TOKEN_CHUNK_SIZE

    def always(device: torch.device) -> bool:
        return True

    trl_utils._use_triton = always
    if device.type == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = _CPU_TOKENS
    try:
        yield
    finally:
        trl_utils._use_triton, chunked_logprob.TOKEN_CHUNK_SIZE = before
