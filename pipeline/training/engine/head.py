"""The head on the positions in the loss alone, on every device.

TRL's fused head scores only the positions whose label counts, but only where Triton runs; on the CPU and on MPS it
projects prompt and padding as well, half of all work for a small model with a large vocabulary. Its own compact
path needs no Triton: the kernel falls back to plain tensor operations by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import trl.trainer.utils as trl_utils


@contextmanager
def compact_head() -> Iterator[None]:
    """While open, TRL's fused heads take their compact path on every device.

    `trl.trainer.utils._use_triton` is asked by `add_fused_lm_head` for that choice and for nothing else (TRL 1.16);
    the kernel module asks its own.
    """
    before = trl_utils._use_triton

    def always(device: torch.device) -> bool:
        return True

    trl_utils._use_triton = always
    try:
        yield
    finally:
        trl_utils._use_triton = before
