"""What every converter returns and uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Demonstration, Message, Preference, Tools
from pipeline.data.strict_json import JsonError, StrictJson

Places = Mapping[str, Sequence[Keys]]
"""For each field of the canonical row: where in the file's row each of its messages (or its text) stands."""

_OTHER_KEYS = {"role": "from", "content": "value"}


class RefusedError(ValueError):
    """A row that conforms to its schema and still has no canonical form.

    Args:
        finding: why.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Converted(NamedTuple):
    """A canonical row and where its parts came from."""

    row: Demonstration | Preference
    places: Places


def own_place(value: Any, finding: Finding) -> Finding:
    """`finding`, about a key of a canonical message, where that stands in the file's row.

    Not every format writes a message as `role` and `content`: ShareGPT says `from` and `value`, and elsewhere the
    message is a text by itself.
    """
    keys = finding.keys
    if not keys or keys[-1] not in _OTHER_KEYS:
        return finding
    for key in keys[:-1]:
        value = value[key]
    if not isinstance(value, dict):
        return replace(finding, keys=keys[:-1])
    other = _OTHER_KEYS[str(keys[-1])]
    return replace(finding, keys=(*keys[:-1], other)) if keys[-1] not in value and other in value else finding


def turn(role: str, content: str) -> Message:
    """One message of plain text."""
    return {"role": role, "content": content}


def turns_of(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """Messages without nulls, which chat templates would print, and with the content as one text."""
    return [_turn(message) for message in messages]


def _turn(message: dict[str, Any]) -> Message:
    if len(message) == 2 and type(message.get("content")) is str:
        return message.copy()
    turn = {key: value for key, value in message.items() if value is not None}
    content = turn.get("content", "")
    turn["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return turn


def places_of(part: str | Sequence[Any], *keys: str | int) -> tuple[Keys, ...]:
    """Where a text, or each message of a list, stands that stands at `keys`."""
    return (keys,) if isinstance(part, str) else _places(keys, len(part))


@lru_cache(maxsize=1024)
def _places(keys: Keys, count: int) -> tuple[Keys, ...]:
    return tuple((*keys, index) for index in range(count))


def tools_of(value: dict[str, Any], *keys: str) -> Tools | None:
    """The `tools` of the object `value`, which stands at `keys`.

    Tables cannot hold objects of many shapes, so they are often kept there as a string of JSON.

    Raises:
        RefusedError: `tools` is text that is no list of objects.
    """
    tools = value.get("tools")
    if isinstance(tools, str):
        at = (*keys, "tools")
        tools = json_in(tools, "invalid-tools", "tools", at)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RefusedError(Finding("invalid-tools", "`tools` is not a list of objects", at))
    return tools or None


def json_in(text: str, code: str, name: str, keys: Keys) -> Any:
    """The JSON value that a text at `keys` holds.

    Raises:
        RefusedError: the text holds none, or more, or one that JSON readers disagree on.
    """
    try:
        parsed = StrictJson().parse(text, 0)
    except JsonError as error:
        raise RefusedError(Finding(code, f"`{name}`: {error.finding.message}", keys)) from None
    if parsed.odd or text[parsed.end :].strip():
        raise RefusedError(Finding(code, f"`{name}` is not one plain JSON value", keys))
    return parsed.value
