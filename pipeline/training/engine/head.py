"""The head on the positions in the loss alone, on every device; on a CPU with its gradient on the way.

TRL's fused head scores only the positions whose label counts, but only where Triton runs; on the CPU and on MPS it
projects prompt and padding as well, half of all work for a small model with a large vocabulary. Its own compact
path needs no Triton: the kernel falls back to plain tensor operations by itself.

Those make about thirty passes over a tile of logits, forward and backward, and the backward pass multiplies by the head
once more to have the logits again. That is not needed where the head is frozen: d log p(t) / d h = W[t] - Σ_v p(v) W[v]
depends on nothing behind the head, and is a row as wide as h. It is computed while the tile is there (as Liger's fused
cross-entropy does for a loss), and the backward pass scales it. For 880 tokens of SmolLM2, forward and backward took
1.07 s in TRL's operations, and 0.63 s so (0.51 s with rounded gradients). Log-probabilities, gradients and what TRL
logs are the same but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from trl.kernels import chunked_logprob

from pipeline.training.engine.half import Half
from pipeline.training.engine.prepacked import has_room

_CPU_TOKENS = 128
"""Tokens in a tile of logits: 64 and 96 were slower on an AMD Zen 4, 256 is 4 % faster in twice the memory."""
_TILE_BYTES = 2**26
_AT_ONCE = 16
"""Rows of a tile whose logits stay in the processor's cache through all passes over them."""
_SCORES = ("log_probs", *chunked_logprob.OPTIONAL_OUTPUTS)
"""What TRL's head gives for each token, in its order."""


@dataclass(frozen=True)
class _Logits:
    """What a model makes of the products with its head: z = cap · tanh(y · scale / cap) / temperature."""

    scale: float
    cap: float | None
    temperature: float

    def of(self, products: torch.Tensor) -> torch.Tensor:
        """The logits, in the place of the products."""
        if self.scale != 1:
            products.mul_(self.scale)
        if self.cap is not None:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products if self.temperature == 1 else products.div_(self.temperature)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """What the cap leaves of a logit's derivative, of `logits`' shape; None where there is no cap."""
        return None if self.cap is None else 1 - (logits * (self.temperature / self.cap)).square()


class _Scored(torch.autograd.Function):
    """Scores of tokens under a frozen head; log-probabilities have a gradient, the other scores are for the log."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        logits: _Logits,
        half: Half | None,
        wanted: frozenset[str],
    ) -> tuple[torch.Tensor | None, ...]:
        count = len(hidden)
        tile = min(count, _tile(len(weight)))
        scores = {
            name: hidden.new_empty(count, dtype=torch.bool if name == "is_top1" else None)
            for name in _SCORES
            if name in wanted
        }
        products = hidden.new_empty(tile, len(weight))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        shares = products if half is None else products.new_empty(products.shape, dtype=torch.bfloat16)
        for start in range(0, count, max(tile, 1)):
            tokens = targets[start : start + tile]
            z = torch.mm(hidden[start : start + tile], weight.t(), out=products[: len(tokens)])
            if bias is not None:
                z.add_(bias)
            own = weight[tokens] if slopes is not None else None
            for at in range(0, len(tokens), _AT_ONCE):
                rows = slice(at, at + _AT_ONCE)
                found, share = _fold(logits.of(z[rows]), tokens[rows], wanted, shares=slopes is not None)
                for name, values in scores.items():
                    values[start + at : start + at + len(tokens[rows])] = found[name]
                if share is not None and own is not None:
                    slope = logits.slope(z[rows])
                    if slope is not None:
                        share.mul_(slope)
                        own[rows].mul_(slope.gather(-1, tokens[rows, None]))
                    shares[at : at + len(share)] = share
            if slopes is not None and own is not None:
                mix = shares[: len(tokens)]
                mix = mix @ weight if half is None else half.through(mix)
                torch.sub(own, mix, out=slopes[start : start + tile])
        if slopes is not None and logits.scale != logits.temperature:
            slopes.mul_(logits.scale / logits.temperature)
        ctx.save_for_backward(slopes)
        outputs = tuple(scores.get(name) for name in _SCORES)
        ctx.mark_non_differentiable(*(values for values in outputs[1:] if values is not None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0][:, None], None, None, None, None, None, None


_scored: Any = _Scored.apply


def _tile(vocabulary: int) -> int:
    """How many tokens' logits are held at a time."""
    return min(_CPU_TOKENS, max(_TILE_BYTES // (4 * vocabulary), _AT_ONCE))


def _fold(
    z: torch.Tensor, targets: torch.Tensor, wanted: frozenset[str], *, shares: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """What is asked of some rows of logits.

    Args:
        z: logits, `[n, V]`.
        targets: `[n]` tokens.
        wanted: names of scores.
        shares: whether probabilities are asked for.

    Returns:
        The scores, `[n]` each, and the probabilities, `[n, V]`.
    """
    highest, first = z.max(dim=-1)  # of equal ones the first, as TRL counts a hit
    e = (z - highest[:, None]).exp_()
    total = e.sum(dim=-1)
    log_z = highest + total.log()
    found = {"log_probs": z.gather(-1, targets[:, None])[:, 0] - log_z, "is_top1": first == targets}
    if "entropy" in wanted:
        found["entropy"] = log_z - (e * z).sum(dim=-1) / total
    if "log_sum_sq_probs" in wanted:
        found["log_sum_sq_probs"] = e.square().sum(dim=-1).log() - 2 * total.log()
    if "mean_logits" in wanted:
        found["mean_logits"] = z.mean(dim=-1)
    return found, e.div_(total[:, None]) if shares else None


class _Head:
    """In the place of TRL's function: the one above where the head is frozen, float32 and on a CPU, else TRL's.

    Args:
        stock: TRL's.
        rounds: whether factors of gradients are rounded to bfloat16.
    """

    def __init__(self, stock: Any, *, rounds: bool) -> None:
        self._stock = stock
        self._rounds = rounds
        self._halves: dict[int, Half] = {}
        self.log_probs_alone = False

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = chunked_logprob.OPTIONAL_OUTPUTS,
    ) -> Any:
        """TRL's arguments, and what it returns."""
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        single = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        if self.log_probs_alone:
            outputs = ()
        if trains or not single or hidden.device.type != "cpu":
            rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return self._stock.apply(hidden, weight, bias, targets, *rest)
        logits = _Logits(logit_scale, final_logit_softcapping, temperature)
        half = self._half(weight) if self._rounds and hidden.requires_grad else None
        return _scored(hidden, weight, bias, targets, logits, half, frozenset(("log_probs", *outputs)))

    def _half(self, weight: torch.Tensor) -> Half:
        if id(weight) not in self._halves:
            self._halves[id(weight)] = Half([weight], kept=has_room(2 * weight.numel(), weight.device))
        return self._halves[id(weight)]


@contextmanager
def log_probs_alone() -> Iterator[None]:
    """While open, a head on a CPU gives log-probabilities and nothing for the log: what is asked of a reference."""
    head = trl_utils._ChunkedLogProbFunction
    if not isinstance(head, _Head):
        yield
        return
    before, head.log_probs_alone = head.log_probs_alone, True
    try:
        yield
    finally:
        head.log_probs_alone = before


@contextmanager
def compact_head(device: torch.device, *, rounds: bool = False) -> Iterator[None]:
    """While open, TRL's fused heads take their compact path, on a CPU through the function above.

    `trl.trainer.utils._use_triton` is asked by `add_fused_lm_head` for that choice and for nothing else (TRL 1.16);
    the kernel module asks its own.

    Args:
        device: where the model is.
        rounds: whether factors of gradients are rounded to bfloat16.
    """
    before = trl_utils._use_triton, trl_utils._ChunkedLogProbFunction, chunked_logprob.TOKEN_CHUNK_SIZE

    def always(device: torch.device) -> bool:
        return True

    trl_utils._use_triton = always
    if device.type == "cpu":
        trl_utils._ChunkedLogProbFunction = _Head(before[1], rounds=rounds)
        chunked_logprob.TOKEN_CHUNK_SIZE = _CPU_TOKENS
    try:
        yield
    finally:
        trl_utils._use_triton, trl_utils._ChunkedLogProbFunction, chunked_logprob.TOKEN_CHUNK_SIZE = before
