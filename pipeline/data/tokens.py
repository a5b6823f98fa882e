"""Preferences to token ids, exactly as TRL's DPOTrainer makes them.

The rules are those of `DPOTrainer._prepare_dataset` of TRL 1.16: the completion starts where the prompt and the prompt
with its completion diverge, plain text ends with the eos token, and a row that is too long is cut at its end
(`keep_start`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from pipeline.data.bounds import RENDER_SECONDS, require_small_rendering, require_small_template, time_limit
from pipeline.data.codes import TOKEN_MENDS
from pipeline.data.rows import Message, Preference
from pipeline.errors import ExitCode, PipelineError

Text: TypeAlias = str | Sequence[Message]
"""Plain text, or the messages of a conversation."""


class Completion(NamedTuple):
    """A prompt and what follows it, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def scored_tokens(self) -> int:
        """How many have a probability: without a prompt nothing precedes the first."""
        return max(len(self.completion_ids) - (not self.prompt_ids), 0)


class Pair(NamedTuple):
    """A prompt with its preferred and its other completion, as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode(tokenizer: Any, text: Text, *, tools: Any = None, add_generation_prompt: bool = False) -> list[int]:
    """The token ids of plain text, or of a conversation in the tokenizer's chat template.

    A template writes its own special tokens, so none are added to what it renders.

    Args:
        tokenizer: the model's tokenizer.
        text: plain text or messages.
        tools: the tools of a conversation, as Transformers takes them, or that as JSON.
        add_generation_prompt: ends a conversation where the assistant's answer begins.

    Raises:
        PipelineError: messages, and no chat template or one that refuses them.
    """
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    return list(
        apply_template(tokenizer, text, tools, add_generation_prompt, tokenize=True, return_dict=True)["input_ids"]
    )


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, add_generation_prompt: bool = False
) -> str:
    """A conversation as the chat template writes it, before it is tokenised.

    Raises:
        PipelineError: no chat template, or one that refuses the conversation.
    """
    return str(apply_template(tokenizer, messages, tools, add_generation_prompt, tokenize=False))


def apply_template(
    tokenizer: Any, messages: Sequence[Message], tools: Any, add_generation_prompt: bool, **how: Any
) -> Any:
    """What the tokenizer's `apply_chat_template` gives.

    Raises:
        PipelineError: no chat template, or one that refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise PipelineError(
            "the rows are conversations and the tokenizer has no chat template",
            code="no-chat-template",
            pointer="/tokenizer/chat_template",
            mend="name a Jinja file as `tokenizer.chat_template`, or take an instruct model",
        )
    try:
        require_small_template(tokenizer.chat_template)
        # Transformers renders in Jinja's sandbox: nothing of Python can be reached, but a loop can be long.
        with time_limit(RENDER_SECONDS):
            rendered = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                add_generation_prompt=add_generation_prompt,
                **how,
            )
        given = len(str(tools or "")) + sum(len(str(message)) for message in messages)
        require_small_rendering(rendered, given)
    except Exception as error:  # whatever a template raises: Jinja's errors, or its own `raise_exception`
        raise PipelineError(
            f"the chat template refuses a conversation: {' '.join(str(error).split())[:200]}",
            code="template-refuses",
            pointer="/tokenizer/chat_template",
            mend=TOKEN_MENDS["template-refuses"],
            exit_code=ExitCode.WRONG,
        ) from error
    return rendered


class Sequences(NamedTuple):
    """A preference row as token ids, before anything is cut."""

    prompt_ids: list[int]
    """The prompt alone, to where the answer begins."""
    chosen: list[int]
    """The prompt with its preferred completion."""
    rejected: list[int]
    start: int
    """Where the completions begin: the earlier of the two places where they diverge from the prompt."""

    def cut(self, max_length: int | None) -> Pair:
        """The pair that is trained on: prompt and completion together have `max_length` tokens at most."""
        return Pair(
            self.chosen[: self.start][:max_length],
            self.chosen[self.start : max_length],
            self.rejected[self.start : max_length],
        )


def tokenize_sequences(tokenizer: Any, row: Preference) -> Sequences:
    """The whole ids of a preference row.

    Raises:
        PipelineError: no chat template, or one that refuses the conversation.
    """
    prompt_ids = encode(tokenizer, row.prompt, tools=row.tools, add_generation_prompt=True)
    chosen = _with_completion(tokenizer, row.prompt, row.chosen, row.tools)
    rejected = _with_completion(tokenizer, row.prompt, row.rejected, row.tools)
    start = min(common_prefix(prompt_ids, chosen), common_prefix(prompt_ids, rejected))
    return Sequences(prompt_ids, chosen, rejected, start)


def tokenize_pair(tokenizer: Any, row: Preference, max_length: int | None = None) -> Pair:
    """The ids of a preference row; prompt and completion together have `max_length` tokens at most.

    Where the prompt alone fills `max_length` the completions are empty: the trainer drops such a row.
    """
    return tokenize_sequences(tokenizer, row).cut(max_length)


def _with_completion(tokenizer: Any, prompt: Text, completion: Text, tools: Any) -> list[int]:
    if isinstance(prompt, str) and isinstance(completion, str):
        ending = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return encode(tokenizer, prompt + completion + ending)
    assert not isinstance(prompt, str), "a row is text or messages, not both"
    assert not isinstance(completion, str), "a row is text or messages, not both"
    return encode(tokenizer, [*prompt, *completion], tools=tools)


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading items (token ids, or characters of two texts) the two share."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
