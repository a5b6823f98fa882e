"""Demonstrations to token ids and labels: the loss is on assistant turns, and each one's stop token is in it.

The spans come from the model's own chat template, rendered up to each assistant turn and behind it, and are carried
over to tokens by character offsets. A mask made by comparing ids with the pad token would drop the stop token of
every model whose pad is its eos, and such a model never learns to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.codes import TOKEN_MENDS
from pipeline.data.rows import Demonstration
from pipeline.data.tokens import common_prefix, encode, render
from pipeline.errors import ExitCode, PipelineError

IGNORED = -100
"""The label of a token outside the loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True)
class Labelled:
    """One row as token ids, `[T]`, and labels, `[T]`: the id inside the loss, -100 outside."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    """Whether the row was longer than `max_length`, so that its end is cut."""
    unlike: tuple[str, str] | None = None
    """How the prompt alone ends, and what stands there with the completion, where the two differ."""


def label_demonstration(tokenizer: Any, row: Demonstration, max_length: int | None = None) -> Labelled:
    """Token ids and labels of a demonstration.

    In a conversation every assistant turn from `row.prompt_turns` on is in the loss (of `row.trained_turns`, where
    they are named), from behind the generation prompt to its stop token; white space that the template sets behind
    the stop token is not. In plain text the completion and the eos token behind it are.

    Raises:
        PipelineError: the chat template is missing, refuses the conversation, or renders a turn so that it
            cannot be told where it ends.
    """
    whole = _label_text(tokenizer, row) if row.messages is None else _label_messages(tokenizer, row)
    return cut(whole, max_length)


def cut(whole: Labelled, max_length: int | None) -> Labelled:
    """The first `max_length` tokens of a labelled row."""
    if max_length is None or len(whole.input_ids) <= max_length:
        return whole
    return Labelled(whole.input_ids[:max_length], whole.labels[:max_length], truncated=True, unlike=whole.unlike)


def _label_text(tokenizer: Any, row: Demonstration) -> Labelled:
    assert row.prompt is not None
    assert row.completion is not None
    ending = "" if row.completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    prompt_ids = encode(tokenizer, row.prompt)
    ids = encode(tokenizer, row.prompt + row.completion + ending)
    start = common_prefix(prompt_ids, ids)
    unlike = None
    if start < len(prompt_ids):
        unlike = tokenizer.decode(prompt_ids[start:]), tokenizer.decode(ids[start : len(prompt_ids)])
    return Labelled(ids, [IGNORED] * start + ids[start:], truncated=False, unlike=unlike)


def _label_messages(tokenizer: Any, row: Demonstration) -> Labelled:
    assert row.messages is not None
    messages = row.messages
    text = render(tokenizer, messages, row.tools)
    ids, starts = tokens_of(tokenizer, text)
    labels = [IGNORED] * len(ids)
    turns = row.trained_turns
    if turns is None:
        turns = tuple(at for at in range(row.prompt_turns, len(messages)) if messages[at]["role"] == "assistant")
    special, reached, unlike = special_ids(tokenizer), 0, None
    for turn in turns:
        begin, end, departs = _turn_span(tokenizer, row, text, turn, reached)
        reached, unlike = end, unlike or departs
        inside = [at for at, start in enumerate(starts) if begin <= start < end]
        stop = next((at for at in reversed(inside) if ids[at] in special), None)
        if stop is not None and not tokenizer.decode(ids[stop + 1 : inside[-1] + 1]).strip():
            inside = inside[: inside.index(stop) + 1]
        elif turn == len(messages) - 1:
            # The template ends the last turn with nothing that stops the model, so the eos token is set there.
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        for at in inside:
            labels[at] = ids[at]
    return Labelled(ids, labels, truncated=False, unlike=unlike)


def _turn_span(
    tokenizer: Any, row: Demonstration, text: str, turn: int, reached: int
) -> tuple[int, int, tuple[str, str] | None]:
    """Where in `text`, the whole conversation rendered, the assistant's turn `turn` begins and ends.

    Args:
        tokenizer: the model's tokenizer.
        row: a conversation.
        text: all of it, rendered.
        turn: index of the message.
        reached: where the assistant's turn before it ends.

    Returns:
        The two, and `Labelled.unlike`.
    """
    assert row.messages is not None
    messages = row.messages
    asked = render(tokenizer, messages[:turn], row.tools, add_generation_prompt=True)
    through = render(tokenizer, messages[: turn + 1], row.tools)
    begin = common_prefix(asked, text)
    unlike = None if begin == len(asked) else (asked[begin:], text[begin : len(asked)])
    if unlike is not None and not text.startswith(render(tokenizer, messages[:turn], row.tools)):
        # What stands before the turn is rendered otherwise as well: some templates set tools or the system turn
        # beside the last message of the user's (Mistral's). So the turn is looked for behind what was asked.
        for message in messages[:turn]:
            content = _content(message)
            at = text.find(content, reached) if content else -1
            reached = at + len(content) if at >= 0 else reached
        if through.startswith(asked) and (at := text.find(through[len(asked) :], reached)) >= 0:
            return at, at + len(through) - len(asked), unlike
        found = _begin_behind(asked, _content(messages[turn - 1]), text, _content(messages[turn]), reached)
        if found is None:
            raise _not_found(turn)
        begin = found
    # Otherwise the generation prompt alone may be rendered otherwise than a turn that was given (an empty thought
    # block, say); then the turn begins where the two part.
    if text.startswith(through):
        return begin, len(through), unlike
    # A template that renders the last turn otherwise than an earlier one (Qwen3 drops earlier thoughts): what
    # follows the content in the last turn closes this one as well.
    content = _content(messages[turn])
    closing = through[through.rfind(content) + len(content) :]
    at = text.find(content + closing, begin) if content else -1
    if at < 0:
        raise _not_found(turn)
    return begin, at + len(content) + len(closing), unlike


def _begin_behind(asked: str, question: str, text: str, content: str, reached: int) -> int | None:
    """Where the turn with `content` begins: behind what stands between the question and the answer in `asked`.

    None where the content is not to be found.
    """
    at = text.find(content, reached) if content else -1
    if at < 0:
        return None
    header = asked[asked.rfind(question) + len(question) :] if question in asked else ""
    behind = text.rfind(header, reached, at) if header else -1
    return behind + len(header) if behind >= 0 else at


def _content(message: Any) -> str:
    return str(message.get("content") or "").strip()


def _not_found(turn: int) -> PipelineError:
    return PipelineError(
        f"the chat template renders assistant turn {turn + 1} so that its end cannot be found",
        code="template-not-prefix",
        pointer="/tokenizer/chat_template",
        mend=TOKEN_MENDS["template-not-prefix"],
        exit_code=ExitCode.WRONG,
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Every id that is special, those included that have no name in the tokenizer (`<|end|>` of Phi)."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def tokens_of(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of rendered text, and the character at which each token begins."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Without offsets: the tokens of every prefix of tokens, decoded, say where the next one begins.
    return ids, [len(tokenizer.decode(ids[:at])) for at in range(len(ids))]
