"""Which kind a file is of, and which of the known formats one of its rows has.

A format is decided before a row is validated, so that a broken row is held to the one shape it was meant to
have. Its name is the name of its definition under `$defs` of the kind's schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.data.place import Finding, shown
from pipeline.data.rows import Kind

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def detect_kind(values: Iterable[Any]) -> Kind | None:
    """The kind of the first row that has one. Only preferences have answers to choose between."""
    for value in values:
        if isinstance(value, dict):
            if "chosen" in value or "rejected" in value:
                return "preference"
            if not value.keys().isdisjoint(("messages", "prompt", "completion")):
                return "demonstration"
    return None


def detect_format(value: Any, kind: Kind | None) -> str | Finding:
    """The format of a row, or why it has none."""
    if not isinstance(value, dict):
        return Finding("not-an-object", f"the row is {type_name(value)}, not an object")
    row = {key: item for key, item in value.items() if item is not None} or value
    for key in _MEDIA:
        if row.get(key):
            return Finding("unsupported-media", f"the row has `{key}`: only text can be trained on", (key,))
    own = detect_kind([row])
    if kind == "preference" and own == kind:
        return f"{_form(row, 'prompt', 'chosen', 'rejected')}-preference"
    if kind == "demonstration" and not row.keys().isdisjoint(("messages", "completion")):
        if "messages" not in row:
            return f"{_form(row, 'prompt', 'completion')}-prompt-completion"
        if "completion" in row:
            return Finding("ambiguous-form", "the row has `messages` and a `completion`")
        return "messages"
    if kind is None or own is None:
        keys = ", ".join(value) or "none"
        return Finding("unknown-shape", f"not the keys of a known format: {shown(keys)}")
    if own == kind:  # a prompt alone
        return f"{_form(row, 'prompt')}-prompt-completion"
    return Finding("wrong-kind", f"the row is a {own}, not a {kind}")


def _form(row: dict[str, Any], *keys: str) -> str:
    """TRL's `standard` or `conversational`, whichever more of the values at `keys` are of."""
    lists = sum(isinstance(row.get(key), list) for key in keys)
    texts = sum(isinstance(row.get(key), str) for key in keys)
    return "standard" if texts > lists else "conversational"


def type_name(value: Any) -> str:
    """What JSON calls the type of `value`, with an article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
