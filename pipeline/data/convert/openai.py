"""OpenAI's fine-tuning files: supervised (chat) and direct preference optimisation.

https://developers.openai.com/api/docs/guides/direct-preference-optimization
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.data.convert.base import Converted, RefusedError, json_in, places_of, tools_of, turns_of
from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Demonstration, Message, Preference


def chat(value: dict[str, Any], line: int) -> Converted:
    """A conversation whose assistant turns of weight 0 are not trained on.

    Raises:
        RefusedError: arguments of a call are no JSON object, or no assistant turn is left to train on.
    """
    given = value["messages"]
    places = places_of(given, "messages")
    turns = _turns(given, places)
    answers = [at for at, message in enumerate(given) if message["role"] == "assistant"]
    trained = tuple(at for at in answers if given[at].get("weight") != 0)
    if answers and not trained:
        raise RefusedError(Finding("nothing-to-train", "every assistant turn has the weight 0", ("messages",)))
    row = Demonstration(
        messages=turns,
        tools=tools_of(value),
        trained_turns=None if len(trained) == len(answers) else trained,
        line=line,
    )
    return Converted(row, {"messages": places})


def preference(value: dict[str, Any], line: int) -> Converted:
    """A conversation and two ways to go on from it.

    Raises:
        RefusedError: arguments of a call are no JSON object.
    """
    given: dict[str, tuple[str, ...]] = {
        "prompt": ("input", "messages"),
        "chosen": ("preferred_output",),
        "rejected": ("non_preferred_output",),
    }
    parts = {"prompt": value["input"]["messages"], **{key: value[given[key][0]] for key in ("chosen", "rejected")}}
    places = {key: places_of(parts[key], *keys) for key, keys in given.items()}
    turns = {key: _turns(parts[key], places[key]) for key in given}
    row = Preference(
        turns["prompt"], turns["chosen"], turns["rejected"], tools=tools_of(value["input"], "input"), line=line
    )
    return Converted(row, places)


def _turns(messages: list[dict[str, Any]], places: Sequence[Keys]) -> list[Message]:
    turns = turns_of(messages)
    for message, keys in zip(turns, places, strict=True):
        message.pop("weight", None)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_call(call, (*keys, "tool_calls", at)) for at, call in enumerate(calls)]
    return turns


def _call(call: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """The call with its arguments as an object, which is what chat templates print as JSON."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        at = (*keys, "function", "arguments")
        arguments = json_in(arguments, "invalid-arguments", "arguments", at)
        if not isinstance(arguments, dict):
            raise RefusedError(Finding("invalid-arguments", "`arguments` is not an object in JSON", at))
    return {**call, "function": {**function, "arguments": arguments}}
