"""Held-out log-probabilities: of whole completions, of preferences against a reference, and as a perplexity.

Source of the implicit reward: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is
Secretly a Reward Model", equation 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.tokens import Completion, Pair
from pipeline.evaluation.inference import evaluating, forward_parameters
from pipeline.evaluation.intervals import Estimate, bootstrap

PairLogps: TypeAlias = Callable[[Sequence[Pair]], tuple[torch.Tensor, torch.Tensor]]
"""Pairs to the log-probabilities of the chosen and of the rejected completions, `[B]` each, in nats."""

See: TypeAlias = Callable[[int, torch.Tensor], None]
"""Called with a completion's index and the float32 logits `[n, V]` of its n scored tokens, on the model's device."""


def completion_logps(
    model: Any,
    completions: Sequence[Completion],
    *,
    batch_size: int = 8,
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
        progress: called with the number of sequences scored since the last call.
        see: shown what each token was predicted from.
    """
    keeps_logits = "logits_to_keep" in forward_parameters(model)
    logps = torch.zeros(len(completions))
    # Prompts of a length together: then the batch has few positions that are a completion's in one row only.
    order = sorted(range(len(completions)), key=lambda index: -len(completions[index].prompt_ids))
    with evaluating(model):
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = _right_padded([completions[index] for index in batch], model.device)
            first = max(min(len(completions[index].prompt_ids) for index in batch), 1)
            kept = ids.shape[1] - first + 1
            arguments = {"logits_to_keep": kept} if keeps_logits else {}
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
            logits = output.logits[:, -kept:]  # [b, kept, V]; logits[:, j] predict position first + j
            for row, index in enumerate(batch):
                own, targets = _scored(logits[row], ids[row], completions[index], first)
                logps[index] = -torch.nn.functional.cross_entropy(own, targets, reduction="sum")
                if see is not None:
                    see(index, own)
            if progress is not None:
                progress(len(batch))
    return logps


def _scored(
    logits: torch.Tensor, ids: torch.Tensor, completion: Completion, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 logits `[n, V]` of a completion's scored tokens, and the tokens `[n]`."""
    start = max(len(completion.prompt_ids), 1)
    end = len(completion.prompt_ids) + len(completion.completion_ids)
    return logits[start - first : end - first].float(), ids[start:end]


def _right_padded(completions: Sequence[Completion], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `[B, T]`; a masked position holds id 0, which nothing reads."""
    sequences = [completion.prompt_ids + completion.completion_ids for completion in completions]
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def pair_logps(
    model: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of the chosen and of the rejected completions, `[B]` float32 nats each.

    Policy and reference score the same pairs in the same batches, so that equal weights give equal figures.
    """
    completions = [Completion(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    logps = completion_logps(model, completions, batch_size=batch_size, progress=progress)
    return logps[0::2], logps[1::2]


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
