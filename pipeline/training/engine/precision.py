"""How float32 matrices are multiplied: as exactly as float32 goes, or faster where the curve stays the same.

On an x86 processor PyTorch multiplies float32 matrices with MKL, unless oneDNN is allowed bfloat16. On a processor
without AMX oneDNN then goes on in float32 all the same, and on AMD's it is faster than MKL; with AMX it rounds. So
each processor is measured, and oneDNN taken where no bit is given away.

`fast` rounds nothing that the loss is read from: on a CPU only the factors of gradients (`linear.py`), where the
processor multiplies bfloat16 by itself. Rounding the forward pass as well moved losses by 0.01 and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Precision = Literal["auto", "exact", "fast"]
_FLOAT32_ERROR = 2e-6
"""Relative error (root mean square) of a float32 product of this size is 3e-7; of bfloat16 2e-3, of TF32 3e-4."""
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of the instructions that multiply bfloat16, on x86 and ARM, in `torch.cpu.get_capabilities`."""


@dataclass(frozen=True)
class Products:
    """How float32 matrices are multiplied."""

    words: str
    """For a person."""
    round: bool
    """Whether the factors of every product are rounded to fewer bits than float32 has."""
    round_gradients: bool = False
    """Whether those of gradients are, in bfloat16."""


@contextmanager
def multiplication(precision: Precision, device: torch.device) -> Iterator[Products]:
    """While open, float32 matrices are multiplied as `precision` says; `auto` is `fast` on a CPU, else `exact`."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        yield _choose(backend, precision, device)
    finally:
        backend.fp32_precision = before


def _choose(backend: Any, precision: Precision, device: torch.device) -> Products:
    words = "float32 products in float32"
    if device.type == "cuda":
        backend.fp32_precision = "tf32" if precision == "fast" else "ieee"
        fast = precision == "fast"
        return Products("float32 products in TF32", round=True) if fast else Products(words, round=False)
    if device.type != "cpu":
        return Products(words, round=False)
    backends: Any = torch.backends
    if backends.mkldnn.is_available():
        backend.fp32_precision = "bf16"
        error = product_error()
        if error <= _FLOAT32_ERROR:
            words += f" by oneDNN (relative error {error:.0e})"
        else:
            backend.fp32_precision = "ieee"
    rounds = precision != "exact" and has_bfloat16()
    return Products(
        f"{words}; those of gradients in bfloat16" if rounds else words, round=False, round_gradients=rounds
    )


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by itself, and oneDNN lets it: ONEDNN_MAX_CPU_ISA may say otherwise."""
    capabilities = torch.cpu.get_capabilities()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return any(capabilities.get(name) for name in _BFLOAT16) and supported is not None and bool(supported())


def product_error() -> float:
    """The relative error, root mean square, of a float32 product as matrices are multiplied now."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    return float(((left @ right.T).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
