"""One pure function per format: from a row that conforms to its schema to the canonical row."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Demonstration, Message, Preference, Tools
from pipeline.data.strict_json import JsonError, StrictJson

Places = dict[str, list[Keys]]
"""For each field of the canonical row: where in the file's row each of its messages (or its text) stands."""


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


def convert(value: dict[str, Any], format: str, line: int) -> Converted:
    """The canonical row of `value`, which conforms to the definition of `format`.

    Raises:
        RefusedError: `tools` is text that is no list of objects.
    """
    match format:
        case "messages":
            return _messages(value, line)
        case "conversational-prompt-completion":
            return _prompt_completion(value, line)
        case "standard-prompt-completion":
            row = Demonstration(prompt=value["prompt"], completion=value["completion"], line=line)
            return Converted(row, {"prompt": [("prompt",)], "completion": [("completion",)]})
        case "conversational-preference" | "standard-preference":
            return _preference(value, line)
        case _:
            raise AssertionError(f"no converter for the format {format}")


def _messages(value: dict[str, Any], line: int) -> Converted:
    turns = value["messages"]
    row = Demonstration(messages=_turns(turns), tools=_tools(value), line=line)
    return Converted(row, {"messages": _places("messages", turns)})


def _prompt_completion(value: dict[str, Any], line: int) -> Converted:
    prompt, completion = value["prompt"], value["completion"]
    row = Demonstration(
        messages=_turns(prompt) + _turns(completion),
        tools=_tools(value),
        prompt_turns=len(prompt),
        line=line,
    )
    return Converted(row, {"messages": _places("prompt", prompt) + _places("completion", completion)})


def _preference(value: dict[str, Any], line: int) -> Converted:
    fields = {key: value[key] for key in ("prompt", "chosen", "rejected")}
    texts = {key: part if isinstance(part, str) else _turns(part) for key, part in fields.items()}
    row = Preference(**texts, tools=_tools(value), line=line)
    return Converted(row, {key: _places(key, part) for key, part in fields.items()})


def _places(key: str, part: str | list[Any]) -> list[Keys]:
    return [(key,)] if isinstance(part, str) else [(key, index) for index in range(len(part))]


def _turns(messages: list[dict[str, Any]]) -> list[Message]:
    return [_turn(message) for message in messages]


def _turn(message: dict[str, Any]) -> Message:
    """Without nulls, which chat templates would print, and with the content as one text."""
    turn = {key: value for key, value in message.items() if value is not None}
    content = turn.get("content", "")
    turn["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return turn


def _tools(value: dict[str, Any]) -> Tools | None:
    """Tables cannot hold objects of many shapes, so `tools` is often kept there as a string of JSON."""
    tools = value.get("tools")
    if isinstance(tools, str):
        try:
            parsed = StrictJson().parse(tools, 0)
        except JsonError as error:
            raise RefusedError(Finding("invalid-tools", f"`tools`: {error.finding.message}", ("tools",))) from None
        whole = not parsed.odd and not tools[parsed.end :].strip()
        tools = parsed.value
        if not whole or not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RefusedError(Finding("invalid-tools", "`tools` is not a list of objects", ("tools",)))
    return tools or None
