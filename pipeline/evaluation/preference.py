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
from pipeline.evaluation.beginning import Beginning, beginning_of, remembers_keys_alone
from pipeline.evaluation.inference import evaluating, forward_parameters, left_padded
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
    share_prompts: bool = False,
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
        share_prompts: computes once what all prompts begin with: the same but for rounding. A proof asks for the plain
            forward instead.
        progress: called with the number of sequences scored since the last call.
        see: shown what each token was predicted from.
    """
    keeps_logits = "logits_to_keep" in forward_parameters(model)
    logps = torch.zeros(len(completions))
    # Prompts of a length together: then the batch has few positions that are a completion's in one row only.
    order = sorted(range(len(completions)), key=lambda index: -len(completions[index].prompt_ids))
    with evaluating(model):
        shared = [completion.prompt_ids for completion in completions] if share_prompts else []
        beginning = beginning_of(model, shared)
        completions = [one._replace(prompt_ids=one.prompt_ids[beginning.length :]) for one in completions]
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = _right_padded([completions[index] for index in batch], model.device)
            first = max(min(len(completions[index].prompt_ids) for index in batch), 1)
            kept = ids.shape[1] - first + 1
            arguments = {"logits_to_keep": kept} if keeps_logits else {}
            output = model(input_ids=ids, use_cache=False, **beginning.inputs(mask), **arguments)
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
    share_prompts: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of the chosen and of the rejected completions, `[B]` float32 nats each.

    Policy and reference score the same pairs in the same batches, so that equal weights give equal figures.

    Args:
        model: as in `completion_logps`.
        pairs: token ids.
        batch_size: completions at a time.
        share_prompts: computes a prompt once for both completions where the model keeps keys and values of it, and
            nothing else: the same log-probabilities but for rounding. A proof asks for the plain forward instead.
        progress: called with the number of completions scored since the last call.
    """
    if not (share_prompts and remembers_keys_alone(model) and all(pair.prompt_ids for pair in pairs)):
        each = [Completion(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        logps = completion_logps(model, each, batch_size=batch_size, progress=progress)
        return logps[0::2], logps[1::2]
    chosen_and_rejected = torch.zeros(len(pairs), 2)
    # Prompts of a length together: they are padded to the longest.
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].prompt_ids))
    count = max(batch_size // 2, 1)
    with evaluating(model):
        beginning = beginning_of(model, [pair.prompt_ids for pair in pairs])
        for at in range(0, len(order), count):
            batch = order[at : at + count]
            chosen_and_rejected[batch] = _after_one_prompt(model, beginning, [pairs[index] for index in batch])
            if progress is not None:
                progress(2 * len(batch))
    return chosen_and_rejected[:, 0], chosen_and_rejected[:, 1]


def _after_one_prompt(model: Any, beginning: Beginning, pairs: Sequence[Pair]) -> torch.Tensor:
    """Log-probabilities of chosen and rejected, `[B, 2]`: the prompts first, flush right, then both completions."""
    prompts, mask = left_padded([pair.prompt_ids[beginning.length :] for pair in pairs], model.device)
    given = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), **beginning.inputs(mask)}
    before = given["attention_mask"]
    prompted = model(input_ids=prompts, use_cache=True, logits_to_keep=1, **given)
    first = prompted.logits[:, -1].float()  # [B, V]: what the completions' first tokens are predicted from
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    ids, mask = _right_padded([Completion([], tokens[:-1]) for tokens in completions], model.device)
    logits = None
    if ids.shape[1]:
        cache = prompted.past_key_values
        cache.batch_repeat_interleave(2)
        behind = before.sum(dim=1).repeat_interleave(2)[:, None] + torch.arange(ids.shape[1], device=model.device)
        seen = torch.cat([before.repeat_interleave(2, dim=0), mask], dim=1)
        logits = model(input_ids=ids, attention_mask=seen, position_ids=behind, past_key_values=cache).logits
    logps = torch.zeros(len(completions))
    for row, tokens in enumerate(completions):
        own = first[row // 2][None]
        if logits is not None:
            own = torch.cat([own, logits[row, : max(len(tokens) - 1, 0)].float()])
        targets = torch.tensor(tokens, device=model.device, dtype=torch.long)
        logps[row] = -torch.nn.functional.cross_entropy(own[: len(tokens)], targets, reduction="sum")
    return logps.view(-1, 2)


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
