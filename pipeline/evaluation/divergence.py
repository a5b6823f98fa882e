"""KL divergence of a policy from its reference on held-out completions, exact over the vocabulary, token by token.

KL(π ‖ π_ref) = Σ_v π(v) (log π(v) - log π_ref(v)) at every position, the text before it given: how far the policy's
next-token distribution has moved where the held-out answers lead. (On the policy's own samples it would be another
figure, and one of the samples' noise.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.data.tokens import Completion

_BYTES = 256 * 2**20
"""What the distributions of one reference may take: float32 over the whole vocabulary for every token."""


def fitting(completions: Sequence[Completion], vocabulary: int) -> int:
    """How many of the first completions can be kept as whole distributions; one at least, if there is one."""
    room = _BYTES // (4 * vocabulary)
    count = 0
    for completion in completions:
        room -= completion.scored_tokens
        if room < 0:
            break
        count += 1
    return max(count, min(1, len(completions)))


class Divergence:
    """Collects a policy's distributions over the first completions, and its divergence from a reference's there.

    Give `see` to `preference.completion_logps`.

    Args:
        completions: those that are scored.
        reference: the distributions that another one kept; None: nothing to diverge from.
        keep: whether this policy's own are kept, to be a reference.
    """

    def __init__(
        self, completions: Sequence[Completion], reference: Mapping[int, torch.Tensor] | None, *, keep: bool
    ) -> None:
        self._completions = completions
        self._reference = reference or {}
        self._keep = keep
        self.kept: dict[int, torch.Tensor] = {}
        """Log-probabilities `[n, V]` by completion, on the CPU."""
        self.nats: dict[int, float] = {}
        """The divergence summed over a completion's tokens, by completion."""

    def see(self, index: int, logits: torch.Tensor) -> None:
        """One completion's logits `[n, V]`."""
        kept = self._keep and index < fitting(self._completions, logits.shape[-1])
        if not kept and index not in self._reference:
            return
        logps = logits.log_softmax(dim=-1).cpu()
        if kept:
            self.kept[index] = logps
        if index in self._reference:
            # PyTorch names the reference first: the sum is over exp(logps) * (logps - reference).
            nats = torch.nn.functional.kl_div(self._reference[index], logps, reduction="sum", log_target=True)
            self.nats[index] = float(nats)
