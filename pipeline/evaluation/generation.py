"""Answers: batched decoding with a key-value cache, from a model's own chat template to plain text.

The loop is written out because Transformers' `generate` fills whatever it is not told from the model's
`generation_config` (temperature, repetition penalty, minimum length): greedy here is the most likely token
and nothing else, and drawing is what `Sampling` says and nothing else. It also takes a finished answer out of
the batch, where `generate` computes it to the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data.tokens import Text, encode
from pipeline.errors import PipelineError
from pipeline.evaluation.beginning import beginning_of
from pipeline.evaluation.inference import evaluating, forward_parameters, left_padded
from pipeline.evaluation.known_prompts import KnownPrompts

_MARK = "0a1b2c3d"
"""An answer that no chat template contains by itself."""


@dataclass(frozen=True)
class Sampling:
    """Drawing tokens instead of taking the most likely one."""

    temperature: float
    """Above 0; logits are divided by it."""
    top_p: float
    """Only the most likely tokens that together have this probability are drawn from (Holtzman et al. 2020)."""
    seed: int
    """Each prompt has random numbers of its own, so an answer does not depend on what else is in its batch."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    """Without the prompt and without special tokens."""
    tokens: int
    """How many it generated, the one that ended it not counted."""
    ended: bool
    """Whether it ended by itself, rather than at `max_new_tokens`."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    batch_size: int,
    tools: Sequence[Any] | None = None,
    sampling: Sampling | None = None,
    known: KnownPrompts | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The answer to every prompt, in the order of the prompts: greedy, or drawn.

    In float32 an answer does not depend on what else is in its batch, rounding aside; in half precision two
    tokens of nearly equal probability may change places.

    Args:
        model: a Transformers causal language model, or a PEFT model around one; its mode and its
            `generation_config` are left as they are.
        tokenizer: the model's.
        prompts: conversations, rendered with the chat template up to the assistant's turn, or plain texts.
        max_new_tokens: at most so many tokens an answer.
        batch_size: prompts at a time; they are sorted by length, so that little is spent on padding.
        tools: the tools of each conversation.
        sampling: how tokens are drawn; None: greedy.
        known: prompts that these very weights have computed; a batch of them is not computed again.
        progress: called with the number of answers finished since the last call.

    Raises:
        PipelineError: a prompt is empty or longer than the model can continue, or there is no chat template.
    """
    tools = tools if tools is not None else [None] * len(prompts)
    ids = [
        encode(tokenizer, prompt, tools=tool, add_generation_prompt=True)
        for prompt, tool in zip(prompts, tools, strict=True)
    ]
    _require_room(model, ids, max_new_tokens)
    stops = stop_tokens(model, tokenizer)
    if "past_key_values" not in forward_parameters(model):
        # Recurrent models keep another state, and some of them let padding into it: one prompt at a time.
        batch_size = 1

    answers: dict[int, Answer] = {}
    # The longest first: a batch that does not fit into memory fails at once.
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            asked = [ids[index] for index in batch]
            for place, generated, ended in _decode(
                model, asked, known, stops, max_new_tokens, progress, _choosers(sampling, batch)
            ):
                text = tokenizer.decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[batch[place]] = Answer(text, len(generated), ended)
    return [answers[index] for index in range(len(ids))]


_Chooser = Callable[[torch.Tensor], int]
"""The logits `[V]` of one position to a token."""


def _choosers(sampling: Sampling | None, prompts: Sequence[int]) -> list[_Chooser] | None:
    return None if sampling is None else [_chooser(sampling, prompt) for prompt in prompts]


def _chooser(sampling: Sampling, prompt: int) -> _Chooser:
    """Draws by inverting the cumulative distribution: one uniform number a token, the prompt's own."""
    numbers = random.Random(f"{sampling.seed}:{prompt}")  # noqa: S311 - not for secrets

    def choose(logits: torch.Tensor) -> int:
        probabilities, tokens = (logits.float() / sampling.temperature).softmax(dim=-1).sort(descending=True)
        cumulative = probabilities.cumsum(dim=-1)
        # The nucleus is every token before which less than `top_p` is gathered: the first always.
        kept = int((cumulative - probabilities < sampling.top_p).sum())
        mark = numbers.random() * float(cumulative[kept - 1])
        return int(tokens[min(int((cumulative[:kept] <= mark).sum()), kept - 1)])

    return choose


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer.

    The tokenizer's eos token, those of the model's `generation_config`, and the special token with which the
    chat template closes an assistant's turn. The last matters where a base model is tuned with a chat
    template: training teaches it that token, and neither of the first two names it.
    """
    stops = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops.update(configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        closing = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_MARK)[2]
        first = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
        stops.update(token for token in first if _is_special(tokenizer, token))
    return frozenset(token for token in stops if token is not None)


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def _require_room(model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(prompts, start=1):
        if not ids:
            raise PipelineError(
                f"prompt {number} has no tokens", code="empty-prompt", mend="give it at least one character"
            )
        if positions is not None and len(ids) + max_new_tokens > positions:
            raise PipelineError(
                f"prompt {number} has {len(ids)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"{positions} positions of the model",
                code="prompt-too-long",
                pointer="/evaluation/max_new_tokens",
                mend="shorten that prompt, or lower `evaluation.max_new_tokens`",
            )


def _decode(
    model: Any,
    prompts: list[list[int]],
    known: KnownPrompts | None,
    stops: frozenset[int],
    max_new_tokens: int,
    progress: Callable[[int], None] | None,
    choosers: Sequence[_Chooser] | None,
) -> list[tuple[int, list[int], bool]]:
    """Decodes one batch: for each prompt its place, the generated ids, and whether it ended by itself.

    Greedy, unless each prompt has a chooser of its own.
    """
    parameters = forward_parameters(model)
    beginning = (known.beginning(prompts) if known is not None else None) or beginning_of(model, prompts)
    follows = [prompt[done:] for prompt, done in zip(prompts, beginning.lengths, strict=True)]
    ids, mask = left_padded(follows, model.device)
    mask = torch.cat([beginning.mask, mask], dim=1)
    cache = beginning.cache
    # A token's position is the number of real tokens before it, so that padding moves nothing.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    generated: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))  # the prompts that are still being answered

    for _ in range(max_new_tokens):
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in parameters:
            arguments["position_ids"] = positions
        if "logits_to_keep" in parameters:
            arguments["logits_to_keep"] = 1
        if "past_key_values" in parameters:
            arguments |= {"past_key_values": cache, "use_cache": True}
        elif "use_cache" in parameters:
            arguments["use_cache"] = False
        output = model(**arguments)
        cache = output.get("past_key_values")
        logits = output.logits[:, -1]
        if choosers is None:
            next_ids = logits.argmax(dim=-1)
        else:
            drawn = [choosers[row](own) for row, own in zip(rows, logits, strict=True)]
            next_ids = torch.tensor(drawn, device=logits.device)

        kept = []
        for at, (row, token) in enumerate(zip(rows, next_ids.tolist(), strict=True)):
            if token in stops:
                ended[row] = True
            else:
                generated[row].append(token)
                kept.append(at)
        if progress is not None and len(kept) < len(rows):
            progress(len(rows) - len(kept))
        rows = [rows[at] for at in kept]
        if not rows:
            break

        selected = torch.tensor(kept, device=ids.device)
        if len(kept) < len(next_ids):
            ids, mask, positions, next_ids = (
                ids[selected],
                mask[selected],
                positions[selected],
                next_ids[selected],
            )
            if cache is not None:
                # Beam search's reordering is the one selection of rows that every kind of cache layer has.
                cache.reorder_cache(selected)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        next_positions = positions[:, -1:] + 1
        if cache is None:
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
            positions = torch.cat([positions, next_positions], dim=1)
        else:
            ids, positions = next_ids[:, None], next_positions

    if progress is not None and rows:
        progress(len(rows))
    return list(zip(range(len(prompts)), generated, ended, strict=True))
