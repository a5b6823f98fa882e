"""Held-out log-probabilities: of whole completions, of preferences against a reference, and as a perplexity.

Source of the implicit reward: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is
Secretly a Reward Model", equation 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.tokens import Completion, Pair
from pipeline.evaluation.inference import evaluating, forward_parameters, right_padded
from pipeline.evaluation.intervals import Estimate, bootstrap
from pipeline.evaluation.known_prompts import KnownPrompts
from pipeline.evaluation.packed import packed_logits, packing
from pipeline.training.engine.trial import rounding_of

_TRIAL_TOKENS = 16
"""Of two completions, on which scoring without padding is held against the plain forward."""

PairLogps: TypeAlias = Callable[[Sequence[Pair]], tuple[torch.Tensor, torch.Tensor]]
"""Pairs to the log-probabilities of the chosen and of the rejected completions, `[B]` each, in nats."""

See: TypeAlias = Callable[[int, torch.Tensor], None]
"""Called with a completion's index and the float32 logits `[n, V]` of its n scored tokens, on the model's device."""


def completion_logps(
    model: Any,
    completions: Sequence[Completion],
    *,
    batch_size: int = 8,
    share_prompts: bool = False,
    known: KnownPrompts | None = None,
    progress: Callable[[int], None] | None = None,
    see: See | None = None,
) -> torch.Tensor:
    """The log π(completion | prompt), summed over the completion's tokens: `[B]` float32 nats on the CPU.

    Sequences are padded on the right, where a causal model never sees it. The head is run only from the first
    completion token of a batch on, and the softmax over completion tokens alone, one row at a time. A first
    token that nothing precedes has no probability and is left out, as TRL's shifted mask leaves it out.

    Args:
        model: a Transformers causal language model, or a PEFT model around one; its mode is left as it is.
        completions: token ids.
        batch_size: sequences at a time.
        share_prompts: without padding, and what all prompts of a batch begin with once, where the model can: the same
            but for rounding. A proof asks for the plain forward instead.
        known: with `share_prompts`, keeps what was computed of the prompts, for `generate` to begin from.
        progress: called with the number of sequences scored since the last call.
        see: shown what each token was predicted from.
    """
    logps = torch.zeros(len(completions))
    # Prompts of a length together: then the batch has few positions that are a completion's in one row only.
    order = sorted(range(len(completions)), key=lambda index: -len(completions[index].prompt_ids))
    with evaluating(model):
        packed = share_prompts and _packs(model, [(completion,) for completion in completions])
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            rows = [completions[index] for index in batch]
            scored = _packed(model, rows, known) if packed else _padded(model, rows)
            for index, logits in zip(batch, scored, strict=True):
                logps[index] = _log_probability(logits, completions[index])
                if see is not None:
                    see(index, logits)
            if progress is not None:
                progress(len(batch))
    return logps


def _padded(model: Any, completions: Sequence[Completion]) -> Iterator[torch.Tensor]:
    """The float32 logits `[n, V]` of each completion's scored tokens, by the plain forward."""
    ids, mask = right_padded([one.prompt_ids + one.completion_ids for one in completions], model.device)
    first = max(min(len(completion.prompt_ids) for completion in completions), 1)
    kept = ids.shape[1] - first + 1
    arguments = {"logits_to_keep": kept} if "logits_to_keep" in forward_parameters(model) else {}
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    logits = output.logits[:, -kept:]  # [b, kept, V]; logits[:, j] predict position first + j
    for row, completion in enumerate(completions):
        start = max(len(completion.prompt_ids), 1)
        end = len(completion.prompt_ids) + len(completion.completion_ids)
        yield logits[row, start - first : end - first].float()


def _packed(model: Any, completions: Sequence[Completion], known: KnownPrompts | None) -> Iterator[torch.Tensor]:
    """The same, on one row without padding."""
    with packing(model):
        logits = packed_logits(model, [(completion,) for completion in completions], known)
    assert logits is not None, "the model read the row of the trial"
    for own in logits:
        yield own.float()


def _packs(model: Any, rows: Sequence[tuple[Completion, ...]]) -> bool:
    """Whether a model gives the same on rows without padding: tried on the beginning of two completions."""
    sequences = [[one.prompt_ids + one.completion_ids for one in row] for row in rows]
    if not rows or any(max(map(len, row)) < 2 for row in sequences):
        return False
    few = [Completion([], max(row, key=len)[:_TRIAL_TOKENS]) for row in sequences[:2]]
    with packing(model) as can:
        try:
            logits = packed_logits(model, [(one,) for one in few]) if can else None
        except Exception:  # whatever a model's code raises on a form that it was not written for
            return False
    if logits is None:
        return False
    apart = [
        abs(_log_probability(own.float(), completion) - _log_probability(other, completion)) / completion.scored_tokens
        for completion, own, other in zip(few, logits, _padded(model, few), strict=True)
    ]
    return max(apart) <= rounding_of(model.dtype)


def _log_probability(logits: torch.Tensor, completion: Completion) -> float:
    """Of a completion, in nats, from the float32 logits `[n, V]` of its scored tokens."""
    sequence = completion.prompt_ids + completion.completion_ids
    targets = torch.tensor(sequence[len(sequence) - len(logits) :], device=logits.device, dtype=torch.long)
    return -float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def pair_logps(
    model: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    share_prompts: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of the chosen and of the rejected completions, `[B]` float32 nats each.

    Policy and reference score the same pairs in the same batches, so that equal weights give equal figures.

    Args:
        model: as in `completion_logps`.
        pairs: token ids.
        batch_size: completions at a time.
        share_prompts: without padding, and a prompt once for both completions, where the model can: the same
            log-probabilities but for rounding. A proof asks for the plain forward instead.
        progress: called with the number of completions scored since the last call.
    """
    rows = [
        (Completion(pair.prompt_ids, pair.chosen_ids), Completion(pair.prompt_ids, pair.rejected_ids)) for pair in pairs
    ]
    with evaluating(model):
        if not (share_prompts and _packs(model, rows)):
            each = [completion for row in rows for completion in row]
            logps = completion_logps(model, each, batch_size=batch_size, progress=progress)
            return logps[0::2], logps[1::2]
        both = torch.zeros(len(pairs), 2)
        count = max(batch_size // 2, 1)
        for at in range(0, len(pairs), count):
            batch = rows[at : at + count]
            with packing(model):
                logits = packed_logits(model, batch)
            assert logits is not None, "the model read the row of the trial"
            completions = [row[side] for side in (0, 1) for row in batch]
            found = [_log_probability(own.float(), one) for own, one in zip(logits, completions, strict=True)]
            both[at : at + len(batch)] = torch.tensor(found).view(2, -1).T
            if progress is not None:
                progress(2 * len(batch))
    return both[:, 0], both[:, 1]


def preference_scores(policy: PairLogps, reference: PairLogps, pairs: Sequence[Pair], beta: float) -> torch.Tensor:
    """The reward margin of each pair, `[B]`: how much more the policy's implicit reward is for the chosen
    answer.

    r(x, y) = β log(π(y|x) / π_ref(y|x)), Rafailov et al. 2023, equation 7 without its partition term, which
    cancels in the margin. Positive: the policy prefers the chosen answer more than its reference does.
    """
    policy_chosen_logps, policy_rejected_logps = policy(pairs)
    reference_chosen_logps, reference_rejected_logps = reference(pairs)
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    return beta * (chosen_logratios - rejected_logratios)


def perplexity(logps: Sequence[float], tokens: Sequence[int], *, seed: int) -> Estimate:
    """The exponential of the mean nats a completion token, over all tokens of all completions.

    Args:
        logps: of each completion, in nats.
        tokens: how many tokens each completion has.
        seed: of the bootstrap, which draws completions.
    """
    statistic = _perplexities(logps, tokens)
    return bootstrap(statistic, len(tokens), seed=seed)


def perplexity_difference(
    logps: Sequence[float], base_logps: Sequence[float], tokens: Sequence[int], *, seed: int
) -> Estimate:
    """The perplexity of `logps` less that of `base_logps` on the same completions, paired."""
    statistic, base_statistic = _perplexities(logps, tokens), _perplexities(base_logps, tokens)
    return bootstrap(lambda rows: statistic(rows) - base_statistic(rows), len(tokens), seed=seed)


def _perplexities(logps: Sequence[float], tokens: Sequence[int]) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    nats, counts = -np.asarray(logps, dtype=np.float64), np.asarray(tokens, dtype=np.float64)

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.exp(nats[rows].sum(axis=1) / counts[rows].sum(axis=1)))

    return statistic
