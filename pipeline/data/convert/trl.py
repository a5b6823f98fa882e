"""TRL's own shapes: https://huggingface.co/docs/trl/dataset_formats."""

from __future__ import annotations

from typing import Any

from pipeline.data.convert.base import Converted, RefusedError, places_of, tools_of, turns_of
from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Demonstration, Message, Preference


def messages(value: dict[str, Any], line: int) -> Converted:
    """A conversation; every assistant turn is trained on."""
    turns = value["messages"]
    row = Demonstration(messages=turns_of(turns), tools=tools_of(value), line=line)
    return Converted(row, {"messages": places_of(turns, "messages")})


def conversational_prompt_completion(value: dict[str, Any], line: int) -> Converted:
    """A conversation in two pieces; only the completion is trained on."""
    prompt, completion = value["prompt"], value["completion"]
    row = Demonstration(
        messages=turns_of(prompt) + turns_of(completion),
        tools=tools_of(value),
        prompt_turns=len(prompt),
        line=line,
    )
    return Converted(row, {"messages": places_of(prompt, "prompt") + places_of(completion, "completion")})


def standard_prompt_completion(value: dict[str, Any], line: int) -> Converted:
    """Text and what follows it."""
    row = Demonstration(prompt=value["prompt"], completion=value["completion"], line=line)
    return Converted(row, {"prompt": [("prompt",)], "completion": [("completion",)]})


def preference(value: dict[str, Any], line: int) -> Converted:
    """A prompt and two answers, all of them text or all of them messages."""
    parts = [value["prompt"], value["chosen"], value["rejected"]]
    prompt, chosen, rejected = [part if isinstance(part, str) else turns_of(part) for part in parts]
    row = Preference(prompt, chosen, rejected, tools_of(value), line)
    return Converted(
        row,
        {
            "prompt": places_of(prompt, "prompt"),
            "chosen": places_of(chosen, "chosen"),
            "rejected": places_of(rejected, "rejected"),
        },
    )


def implicit_prompt(value: dict[str, Any], line: int) -> Converted:
    """Two conversations or two texts that begin alike: the common prefix is the prompt.

    The rule is that of TRL's `extract_prompt`: turns are compared one by one; text character by character, and a
    space before the place where they part goes to the answers. TRL compares the turns as they stand; here they are
    compared in their canonical form, so that content as text and the same content in parts are equal.

    Raises:
        RefusedError: they share nothing, or one is the beginning of the other.
    """
    chosen, rejected = (
        part if isinstance(part, str) else turns_of(part) for part in (value["chosen"], value["rejected"])
    )
    cut = _common_prefix(chosen, rejected)
    if cut == min(len(chosen), len(rejected)):
        if len(chosen) == len(rejected):
            finding = Finding("chosen-equals-rejected", "`chosen` and `rejected` are the same", ("rejected",))
        else:
            shorter = "chosen" if len(chosen) == cut else "rejected"
            finding = Finding("no-answer", f"`{shorter}` has nothing but what the other begins with", (shorter,))
        raise RefusedError(finding)
    if isinstance(chosen, str) and chosen[cut - 1 : cut] == " ":
        cut -= 1
    if cut == 0:
        finding = Finding("no-common-prompt", "`chosen` and `rejected` do not begin alike", ("rejected",))
        raise RefusedError(finding)
    row = Preference(chosen[:cut], chosen[cut:], rejected[cut:], tools_of(value), line)
    return Converted(
        row,
        {
            "prompt": places_of(chosen, "chosen")[:cut],
            "chosen": _rest(chosen, "chosen", cut),
            "rejected": _rest(rejected, "rejected", cut),
        },
    )


def _rest(part: str | list[Message], key: str, cut: int) -> tuple[Keys, ...]:
    return places_of(part, key) if isinstance(part, str) else places_of(part, key)[cut:]


def _common_prefix(one: str | list[Message], other: str | list[Message]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
