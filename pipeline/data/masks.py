"""Demonstrations to token ids and labels: the loss is on assistant turns, and each one's stop token is in it.

The spans come from the model's own chat template, rendered up to each assistant turn and behind it, and are carried
over to tokens by character offsets. A mask made by comparing ids with the pad token would drop the stop token of
every model whose pad is its eos, and such a model never learns to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.rows import Demonstration
from pipeline.errors import ExitCode, PipelineError
from pipeline.data.tokens import encode

IGNORED = -100
"""The label of a token outside the loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True)
class Labelled:
    """One row as token ids, `[T]`, and labels, `[T]`: the id inside the loss, -100 outside."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    """Whether the row was longer than `max_length`, so that its end is cut."""


@dataclass
class Counted:
    """What tokenising did to the rows of a file."""

    rows: int = 0
    used: int = 0
    truncated: int = 0
    """Rows that were cut at their end."""
    dropped: int = 0
    """Rows of which nothing is left in the loss after the cut."""
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    dropped_rows: list[int] = field(default_factory=list)
    """The first ten rows that were dropped, counted from 1."""

    def add(self, *, length: int, in_loss: int, truncated: bool) -> bool:
        """Counts one row; says whether it is used."""
        self.rows += 1
        self.truncated += truncated
        if not in_loss:
            self.dropped += 1
            if len(self.dropped_rows) < 10:
                self.dropped_rows.append(self.rows)
            return False
        self.used += 1
        self.tokens += length
        self.loss_tokens += in_loss
        self.longest = max(self.longest, length)
        return True


def label_demonstration(tokenizer: Any, row: Demonstration, max_length: int | None = None) -> Labelled:
    """Token ids and labels of a demonstration.

    In a conversation every assistant turn from `row.prompt_turns` on is in the loss, from behind the generation
    prompt to its stop token; white space that the template sets behind the stop token is not. In plain text the
    completion and the eos token behind it are.

    Raises:
        PipelineError: the chat template is missing, refuses the conversation, or renders a turn so that it
            cannot be told where it ends.
    """
    ids, labels = _label_text(tokenizer, row) if row.messages is None else _label_messages(tokenizer, row)
    cut = max_length is not None and len(ids) > max_length
    return Labelled(ids[:max_length], labels[:max_length], cut)


def label_demonstrations(
    tokenizer: Any, rows: Sequence[Demonstration], max_length: int
) -> tuple[list[dict[str, list[int]]], Counted]:
    """The rows as TRL's SFTTrainer takes them tokenised (`input_ids`, `labels`), and what became of them.

    Raises:
        PipelineError: a row cannot be rendered, or none has anything left in the loss.
    """
    counted = Counted()
    labelled = []
    for row in rows:
        one = label_demonstration(tokenizer, row, max_length)
        in_loss = sum(label != IGNORED for label in one.labels)
        if counted.add(length=len(one.input_ids), in_loss=in_loss, truncated=one.truncated):
            labelled.append({"input_ids": one.input_ids, "labels": one.labels})
    return labelled, counted


def _label_text(tokenizer: Any, row: Demonstration) -> tuple[list[int], list[int]]:
    assert row.prompt is not None
    assert row.completion is not None
    ending = "" if row.completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    prompt_ids = encode(tokenizer, row.prompt)
    ids = encode(tokenizer, row.prompt + row.completion + ending)
    start = next(
        (at for at, (one, other) in enumerate(zip(prompt_ids, ids, strict=False)) if one != other),
        min(len(prompt_ids), len(ids)),
    )
    return ids, [IGNORED] * start + ids[start:]


def _label_messages(tokenizer: Any, row: Demonstration) -> tuple[list[int], list[int]]:
    assert row.messages is not None
    messages = row.messages
    text = _render(tokenizer, messages, row.tools)
    ids, starts = _tokens(tokenizer, text)
    labels = [IGNORED] * len(ids)
    turns = [at for at in range(row.prompt_turns, len(messages)) if messages[at]["role"] == "assistant"]
    for turn in turns:
        begin, end = _turn_span(tokenizer, row, text, turn)
        inside = [at for at, start in enumerate(starts) if begin <= start < end]
        stop = next((at for at in reversed(inside) if ids[at] in tokenizer.all_special_ids), None)
        if stop is not None and not tokenizer.decode(ids[stop + 1 : inside[-1] + 1]).strip():
            inside = inside[: inside.index(stop) + 1]
        elif turn == len(messages) - 1:
            # The template ends the last turn with nothing that stops the model, so the eos token is set there.
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        for at in inside:
            labels[at] = ids[at]
    return ids, labels


def _turn_span(tokenizer: Any, row: Demonstration, text: str, turn: int) -> tuple[int, int]:
    """Where in `text`, the whole conversation rendered, the assistant's turn `turn` begins and ends."""
    assert row.messages is not None
    messages = row.messages
    # Some templates render the generation prompt otherwise than a turn that was given (an empty thought block,
    # say); then the turn begins where the two part.
    begin = _common_prefix(_render(tokenizer, messages[:turn], row.tools, add_generation_prompt=True), text)
    through = _render(tokenizer, messages[: turn + 1], row.tools)
    if text.startswith(through):
        return begin, len(through)
    # A template that renders the last turn otherwise than an earlier one (Qwen3 drops earlier thoughts): what
    # follows the content in the last turn closes this one as well.
    content = str(messages[turn].get("content") or "").strip()
    closing = through[through.rfind(content) + len(content) :]
    at = text.find(content + closing, begin) if content else -1
    if at < 0:
        raise PipelineError(
            f"the chat template renders assistant turn {turn + 1} so that its end cannot be found",
            code="template-not-prefix",
            pointer="/tokenizer/chat_template",
            mend="name a template that renders each turn alike wherever it stands as `tokenizer.chat_template`",
        )
    return begin, at + len(content) + len(closing)


def _render(tokenizer: Any, messages: Sequence[Any], tools: Any, *, add_generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        encode(tokenizer, messages)  # raises: it names the mend
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # whatever a template raises: Jinja's errors, or its own `raise_exception`
        raise PipelineError(
            f"the chat template refuses a conversation: {' '.join(str(error).split())[:200]}",
            code="template-refuses",
            pointer="/tokenizer/chat_template",
            mend="change the conversation (often: no system turn, or strictly alternating roles) or the template",
            exit_code=ExitCode.WRONG,
        ) from error
    return str(rendered)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of rendered text, and the character at which each token begins."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Without offsets: the tokens of every prefix of tokens, decoded, say where the next one begins.
    return ids, [len(tokenizer.decode(ids[:at])) for at in range(len(ids))]


def _common_prefix(one: str, other: str) -> int:
    return next(
        (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right),
        min(len(one), len(other)),
    )
