"""Held-out demonstrations as questions: what is asked, and the answer that came with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.masks import IGNORED, label_demonstration
from pipeline.data.rows import Demonstration, Message, Tools
from pipeline.data.tokens import Completion


@dataclass(frozen=True)
class Question:
    """A prompt and the demonstrated answer."""

    prompt: str | list[Message]
    answer: str | list[Message]
    """Plain text after plain text; after a conversation, one assistant's turn in a list."""
    tools: Tools | None = None

    @property
    def reference(self) -> str | None:
        """The answer's text; None where the turn has none (it calls a tool)."""
        content = self.answer if isinstance(self.answer, str) else self.answer[0].get("content")
        return content if isinstance(content, str) else None


def question_of(row: Demonstration) -> Question | None:
    """The demonstration as a question: everything before the last assistant's turn is asked.

    None where it has no assistant's turn with something before it, and so asks nothing.
    """
    if row.messages is None:
        assert row.prompt is not None, "a row without messages is text"
        assert row.completion is not None, "a row without messages is text"
        return Question(row.prompt, row.completion, row.tools)
    turns = enumerate(row.messages)
    last = max((index for index, turn in turns if turn["role"] == "assistant"), default=0)
    return Question(row.messages[:last], row.messages[last : last + 1], row.tools) if last > 0 else None


def completion_of(tokenizer: Any, question: Question, max_length: int | None = None) -> Completion:
    """The demonstrated answer as token ids: those that training has in its loss, for the perplexity.

    Raises:
        PipelineError: the chat template cannot render the conversation.
    """
    if isinstance(question.prompt, str):
        assert isinstance(question.answer, str), "text is answered with text"
        row = Demonstration(prompt=question.prompt, completion=question.answer)
    else:
        assert not isinstance(question.answer, str), "a conversation is answered with a turn"
        messages = question.prompt + question.answer
        row = Demonstration(messages, tools=question.tools, prompt_turns=len(question.prompt))
    labelled = label_demonstration(tokenizer, row, max_length)
    inside = [at for at, label in enumerate(labelled.labels) if label != IGNORED]
    if not inside:
        return Completion(labelled.input_ids, [])
    return Completion(labelled.input_ids[: inside[0]], labelled.input_ids[inside[0] : inside[-1] + 1])
