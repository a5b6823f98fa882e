"""One pure function per format: from a row that conforms to its schema to the canonical row."""

from __future__ import annotations

from typing import Any

from pipeline.data.convert import alpaca, openai, sharegpt, transcripts, trl
from pipeline.data.convert.base import Converted, RefusedError, own_place

__all__ = ["Converted", "RefusedError", "convert", "own_place"]

_CONVERTERS = {
    "messages": trl.messages,
    "conversational-prompt-completion": trl.conversational_prompt_completion,
    "standard-prompt-completion": trl.standard_prompt_completion,
    "conversational-preference": trl.preference,
    "standard-preference": trl.preference,
    "conversational-implicit-prompt": trl.implicit_prompt,
    "standard-implicit-prompt": trl.implicit_prompt,
    "ultrafeedback-binarized": trl.implicit_prompt,
    "openai-chat": openai.chat,
    "openai-preference": openai.preference,
    "alpaca": alpaca.demonstration,
    "alpaca-preference": alpaca.preference,
    "alpaca-ranked": alpaca.ranked,
    "question-preference": alpaca.question,
    "input-preference": alpaca.input_preference,
    "response-preference": alpaca.responses,
    "sharegpt": sharegpt.demonstration,
    "sharegpt-preference": sharegpt.preference,
    "hh-transcripts": transcripts.preference,
}


def convert(value: dict[str, Any], format: str, line: int) -> Converted:
    """The canonical row of `value`, which conforms to the definition of `format`.

    Raises:
        RefusedError: what a schema cannot say keeps it from having one.
    """
    return _CONVERTERS[format](value, line)
