"""The canonical rows: what training, evaluation and inspection see, whatever format the file was in.

Names and meaning are TRL's: a row is *standard* (text, taken as it stands) or *conversational* (messages,
which the model's chat template renders).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["demonstration", "preference"]
"""What a file is for: supervised fine-tuning, or preference optimisation."""

Message = dict[str, Any]
"""One turn: `role` and `content` (always text), and what the file had besides (`tool_calls`, `name`, …)."""

Tools = list[dict[str, Any]]
"""JSON Schemas of the functions that the assistant may call."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One row for supervised fine-tuning: either `messages`, or `prompt` and `completion`."""

    messages: list[Message] | None = None
    """A conversation, ending with an assistant turn."""
    prompt: str | None = None
    completion: str | None = None
    """Plain text; only the completion is trained on."""
    tools: Tools | None = None
    prompt_turns: int = 0
    """How many leading messages are the prompt; assistant turns in it are not trained on. 0: all are."""
    trained_turns: tuple[int, ...] | None = None
    """Indices of the messages that are trained on, all of them assistant turns; None: every one behind the prompt."""
    line: int = field(default=0, compare=False)
    """Where in its file the row begins: its line or, in files without lines, its number, both from 1."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One row for preference optimisation: all three are text, or all three are lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: Tools | None = None
    line: int = field(default=0, compare=False)
    """Where in its file the row begins: its line or, in files without lines, its number, both from 1."""
