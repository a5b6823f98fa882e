"""How float32 matrices are multiplied: as exactly as float32 goes, or faster where the curve stays the same.

On an x86 processor PyTorch multiplies float32 matrices with MKL, unless oneDNN is allowed bfloat16. On a processor
without AMX oneDNN then goes on in float32 all the same, and on AMD's it is twice as fast as MKL; with AMX it rounds.
So `exact` measures which of the two this processor does, and takes oneDNN where no bit is given away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Precision = Literal["exact", "fast"]
_FLOAT32_ERROR = 2e-6
"""Relative error (root mean square) of a float32 product of this size is 3e-7; of bfloat16 2e-3, of TF32 3e-4."""


@dataclass(frozen=True)
class Products:
    """How float32 matrices are multiplied."""

    words: str
    """For a person."""
    round: bool
    """Whether the factors are rounded to fewer bits than float32 has."""


@contextmanager
def multiplication(precision: Precision, device: torch.device) -> Iterator[Products]:
    """While open, float32 matrices are multiplied as `precision` says."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        yield _choose(backend, precision, device)
    finally:
        backend.fp32_precision = before


def _choose(backend: Any, precision: Precision, device: torch.device) -> Products:
    plain = Products("float32 products in float32", round=False)
    backends: Any = torch.backends
    if device.type == "cuda":
        backend.fp32_precision = "tf32" if precision == "fast" else "ieee"
        return Products("float32 products in TF32", round=True) if precision == "fast" else plain
    if device.type != "cpu" or not backends.mkldnn.is_available():
        return plain
    backend.fp32_precision = "bf16"
    error = product_error()
    if error <= _FLOAT32_ERROR:
        return Products(f"float32 products in float32 by oneDNN (relative error {error:.0e})", round=False)
    if precision == "fast":
        return Products(f"float32 products in bfloat16 by oneDNN (relative error {error:.0e})", round=True)
    backend.fp32_precision = "ieee"
    return plain


def product_error() -> float:
    """The relative error, root mean square, of a float32 product as matrices are multiplied now."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    return float(((left @ right.T).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
