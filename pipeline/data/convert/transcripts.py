"""Anthropic's HH transcripts: a whole conversation in one text, once for each of two last answers.

https://huggingface.co/datasets/Anthropic/hh-rlhf
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.data.convert.base import Converted, RefusedError, turn
from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Message, Preference

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference(value: dict[str, Any], line: int) -> Converted:
    r"""`chosen` and `rejected`, split before the assistant's last turn; what stands before it is the prompt.

    White space at both ends of a turn is dropped: it belongs to the transcript.

    Raises:
        RefusedError: a text does not begin with `\n\nHuman:`, has a turn without text, does not end with the
            assistant, or the two prompts differ.
    """
    chosen, rejected = (_transcript(value[key], key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        message = "the conversations before the last answers of `chosen` and `rejected` differ"
        raise RefusedError(Finding("prompts-differ", message, ("rejected",)))
    row = Preference(chosen[:-1], chosen[-1:], rejected[-1:], line=line)
    places: list[Keys] = [("chosen",)] * len(row.prompt)
    return Converted(row, {"prompt": places, "chosen": [("chosen",)], "rejected": [("rejected",)]})


def _transcript(text: str, key: str) -> list[Message]:
    start, *rest = _SPEAKER.split(text)
    if start.strip() or not rest or rest[0] != "Human":
        raise RefusedError(Finding("invalid-transcript", f"`{key}` does not begin with a `Human:` turn", (key,)))
    turns = [turn(_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True)]
    if turns[-1]["role"] != "assistant":
        raise RefusedError(Finding("invalid-transcript", f"`{key}` does not end with an `Assistant:` turn", (key,)))
    return turns
