"""Which kind a file is of, and which of the known formats one of its rows has.

A format is decided by the keys that a row has, before it is validated, so that a broken row is held to the one shape
it was meant to have. Some rows fit two formats; then the one that the file began with is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.data.place import Finding, shown
from pipeline.data.rows import Kind

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_PREFERRED = frozenset(("preferred_output", "non_preferred_output"))
_RESPONSES = frozenset(("chosen_response", "rejected_response"))
_CHOICE = frozenset(("chosen", "rejected"))


def detect_kind(values: Iterable[Any]) -> Kind | None:
    """The kind of the first row that has one. Only preferences have answers to choose between."""
    for value in values:
        if isinstance(value, dict):
            if _preferences(value):
                return "preference"
            if _demonstrations(value):
                return "demonstration"
    return None


def detect_format(value: Any, kind: Kind | None, first: str | None = None) -> str | Finding:
    """The format of a row, or why it has none.

    Args:
        value: the row.
        kind: the kind of its file.
        first: the format that the file began with.
    """
    if not isinstance(value, dict):
        return Finding("not-an-object", f"the row is {type_name(value)}, not an object")
    row = value
    if None in value.values():
        row = {key: item for key, item in value.items() if item is not None} or value
    for key in _MEDIA:
        if row.get(key):
            return Finding("unsupported-media", f"the row has `{key}`: only text can be trained on", (key,))
    if kind and (own := _FORMATS[kind](row)):
        if kind == "demonstration" and {"messages", "completion"} <= row.keys():
            return Finding("ambiguous-form", "the row has `messages` and a `completion`")
        return first if first in own else own[0]
    if kind and (other := detect_kind([row])):
        return Finding("wrong-kind", f"the row is a {other}, not a {kind}")
    keys = ", ".join(value) or "none"
    return Finding("unknown-shape", f"not the keys of a known format: {shown(keys)}")


def _demonstrations(row: dict[str, Any]) -> list[str]:
    """The formats of demonstrations that the row may have, the likeliest first."""
    keys = row.keys()
    if "messages" in keys:
        return ["openai-chat"] if _is_openai(row) else ["messages", "openai-chat"]
    if "completion" in keys:
        return [f"{form}-prompt-completion" for form in _forms(row, "prompt", "completion")]
    if _preferences(row):
        return []
    if "conversations" in keys:
        return ["sharegpt"]
    if "prompt" in keys:
        return [f"{form}-prompt-completion" for form in _forms(row, "prompt")]
    if "instruction" in keys or "output" in keys:
        return ["alpaca"]
    return []


def _preferences(row: dict[str, Any]) -> list[str]:
    """The formats of preferences that the row may have, the likeliest first."""
    keys = row.keys()
    if not keys.isdisjoint(_PREFERRED):
        return ["openai-preference"]
    if not keys.isdisjoint(_RESPONSES):
        return ["response-preference"]
    if keys.isdisjoint(_CHOICE):
        return ["alpaca-ranked"] if "instruction" in keys and isinstance(row.get("output"), list) else []
    if "prompt" in keys:
        if isinstance(row["prompt"], str) and _begins_with_prompt(row):
            return ["ultrafeedback-binarized"]
        return [f"{form}-preference" for form in _forms(row, "prompt", "chosen", "rejected")]
    for key, format in (
        ("conversations", "sharegpt-preference"),
        ("instruction", "alpaca-preference"),
        ("question", "question-preference"),
        ("input", "input-preference"),
    ):
        if key in keys:
            return [format]
    answers = [row[key] for key in ("chosen", "rejected") if isinstance(row.get(key), str)]
    if any(answer.lstrip().startswith("Human:") for answer in answers):
        return ["hh-transcripts"]
    formats = [f"{form}-implicit-prompt" for form in _forms(row, "chosen", "rejected")]
    return [*formats, "hh-transcripts"] if answers else formats


_FORMATS = {"preference": _preferences, "demonstration": _demonstrations}


def _is_openai(row: dict[str, Any]) -> bool:
    """Whether something in the messages is OpenAI's way and not TRL's: a weight, arguments as text."""
    messages = row["messages"] if isinstance(row["messages"], list) else []
    for message in messages:
        if isinstance(message, dict):
            if message.get("weight") is not None:
                return True
            calls = message.get("tool_calls")
            for call in calls if isinstance(calls, list) else []:
                function = call.get("function") if isinstance(call, dict) else None
                if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                    return True
    return False


def _begins_with_prompt(row: dict[str, Any]) -> bool:
    """Whether an answer is a whole conversation, with the turns of the prompt in front."""
    for key in ("chosen", "rejected"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and len(turns) > 1:
            return turns[0].get("role") != "assistant"
    return False


def _forms(row: dict[str, Any], *keys: str) -> list[str]:
    """TRL's `standard` or `conversational`, whichever more of the values at `keys` are of; both where none is."""
    types = [type(row.get(key)) for key in keys]
    lists, texts = types.count(list), types.count(str)
    if lists == texts:
        return ["conversational", "standard"]
    return ["standard" if texts > lists else "conversational"]


def type_name(value: Any) -> str:
    """What JSON calls the type of `value`, with an article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
