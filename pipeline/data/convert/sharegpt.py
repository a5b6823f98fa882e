"""ShareGPT's shape, with LLaMA-Factory's roles for tools (its `data/README.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.data.convert.base import Converted, RefusedError, json_in, places_of, tools_of, turn
from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Demonstration, Message, Preference

_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}


def demonstration(value: dict[str, Any], line: int) -> Converted:
    """`conversations`, perhaps with `system` and `tools`; every assistant turn and every call is trained on.

    Raises:
        RefusedError: a `function_call` is no JSON of a call.
    """
    turns, places = _conversation(value)
    row = Demonstration(messages=turns, tools=tools_of(value), line=line)
    return Converted(row, {"messages": places})


def preference(value: dict[str, Any], line: int) -> Converted:
    """`conversations` and two turns that may follow.

    Raises:
        RefusedError: a `function_call` is no JSON of a call.
    """
    prompt, places = _conversation(value)
    chosen, rejected = ([_turn(value[key], (key,))] for key in ("chosen", "rejected"))
    row = Preference(prompt, chosen, rejected, tools=tools_of(value), line=line)
    return Converted(row, {"prompt": places, "chosen": [("chosen",)], "rejected": [("rejected",)]})


def _conversation(value: dict[str, Any]) -> tuple[list[Message], Sequence[Keys]]:
    given = value["conversations"]
    places = places_of(given, "conversations")
    turns = [_turn(one, keys) for one, keys in zip(given, places, strict=True)]
    system = value.get("system")
    # A system turn in the conversation says it again, more closely: LLaMA-Factory lets it win as well.
    if system and system.strip() and turns[0]["role"] != "system":
        return [turn("system", system), *turns], [("system",), *places]
    return turns, places


def _turn(given: dict[str, Any], keys: Keys) -> Message:
    if given["from"] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(given["value"], (*keys, "value"))}
    return turn(_ROLES[given["from"]], given["value"])


def _calls(text: str, keys: Keys) -> list[dict[str, Any]]:
    """The calls in the JSON text of a `function_call`: one object with `name` and `arguments`, or a list of them."""
    parsed = json_in(text, "invalid-arguments", "value", keys)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise RefusedError(Finding("invalid-arguments", "`value` is an empty list of calls", keys))
    return [{"type": "function", "function": _function(call, keys)} for call in calls]


def _function(call: Any, keys: Keys) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        message = "`value` is no call: an object with `name` and `arguments` in JSON"
        raise RefusedError(Finding("invalid-arguments", message, keys))
    arguments = call["arguments"]
    if isinstance(arguments, str):
        arguments = json_in(arguments, "invalid-arguments", "value", keys)
    if not isinstance(arguments, dict):
        raise RefusedError(Finding("invalid-arguments", "the `arguments` of a call are not an object", keys))
    return {"name": call["name"], "arguments": arguments}
