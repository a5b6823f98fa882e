"""Holds a row to the JSON Schema of its format, and says in words what the schema found.

`jsonschema` decides whether a row conforms; this module only translates. The schemas are files of their own
(`schemas/*.schema.json`), for editors and other tools as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, cast

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry

from pipeline.data.accept import Accepts, fast_accept
from pipeline.data.formats import type_name
from pipeline.data.place import Finding, Keys, shown
from pipeline.data.rows import Kind
from pipeline.data.schema_files import definition, load_schema

_TYPES = {"string": "text", "array": "a list", "object": "an object", "null": "null"}
_ROLES = {
    **dict.fromkeys(("human", "customer", "prompter", "instruction"), "user"),
    **dict.fromkeys(("gpt", "bot", "ai", "model", "chatgpt", "agent", "assistent"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}
_NEVER_MIXED = ("conversations", "instruction", "question", "input")
"""Keys of formats that have one form only."""
_SHAREGPT = ("system", "human", "gpt", "function_call", "observation")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("user", "customer", "prompter"), "human"),
    **dict.fromkeys(("assistant", "chatgpt", "bot", "ai", "model", "bing", "bard"), "gpt"),
    **dict.fromkeys(("tool", "function_response", "function-response"), "observation"),
    **dict.fromkeys(("tool_call", "function-call", "function"), "function_call"),
}
_OTHER_NAMES = {
    "role": ("from", "author", "speaker"),
    "from": ("role", "author", "speaker"),
    "value": ("content", "text", "message"),
    "instruction": ("prompt", "question", "input", "query"),
    "output": ("response", "answer", "completion", "target"),
    "content": ("value", "text", "message"),
    "prompt": ("question", "instruction", "input", "query"),
    "completion": ("response", "answer", "output", "target"),
    "chosen": ("accepted", "preferred", "win"),
    "rejected": ("dispreferred", "lose"),
    "arguments": ("parameters", "args", "input"),
}


@cache
def _validator(kind: Kind, format: str) -> Draft202012Validator:
    # An empty registry: whatever a schema refers to, nothing is ever fetched.
    return Draft202012Validator(definition(kind, format), registry=Registry())


@cache
def _fast(kind: Kind, format: str) -> Accepts:
    return fast_accept(definition(kind, format))


@cache
def _visible() -> re.Pattern[str]:
    return re.compile(load_schema("demonstration")["$defs"]["text"]["pattern"])


def is_blank(text: str) -> bool:
    """Whether the schemas take `text` for blank: nothing in it can be seen."""
    return not "!" <= text[:1] <= "~" and _visible().search(text) is None


def accepts_at_once(row: dict[str, Any], kind: Kind, format: str) -> bool:
    """Whether `row` is seen at once to conform to its format; where it is not, `violations` decides."""
    return _fast(kind, format)(row)


def violations(row: dict[str, Any], kind: Kind, format: str) -> Iterator[Finding]:
    """Everything in which `row` departs from the definition of its format; nothing is said twice."""
    said: set[tuple[Keys | None, str]] = set()
    for error in _validator(kind, format).iter_errors(row):
        for leaf in _leaves(error):
            for finding in _missing(leaf) if leaf.validator == "required" else [_explain(leaf, row)]:
                if (finding.keys, finding.message) not in said:
                    said.add((finding.keys, finding.message))
                    yield finding


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """The error itself; of alternatives that all failed, what the first one lacks.

    The schemas put the ordinary case first: a turn has content. The other cases are exceptions from it.
    """
    if error.validator != "anyOf":
        yield error
        return
    for inner in error.context or ():
        if inner.schema_path[0] == 0:
            yield from _leaves(inner)


def _explain(error: ValidationError, row: dict[str, Any]) -> Finding:
    keys: Keys = tuple(error.absolute_path)
    name = f"`{keys[-1]}`" if keys and isinstance(keys[-1], str) else "the item"
    value = error.instance
    match error.validator:
        case "type":
            return _wrong_type(error, keys, name, row)
        case "enum" if keys[-1] in ("role", "from"):
            return _unknown_role(value, keys)
        case "enum" | "const" if keys[-1] == "weight":
            return Finding("invalid-value", "`weight` is 0 or 1, and an assistant turn's alone", keys)
        case "minItems" | "maxItems" if keys[0] in ("history", "output"):
            what = "a pair of question and answer" if keys[0] == "history" else "two answers, the better one first"
            return Finding("invalid-value", f"{name} is not {what}", keys)
        case "const" if keys[-1] == "type" and "content" in keys:
            what = f"`{shown(value)}`" if isinstance(value, str) else type_name(value)
            return Finding("unsupported-part", f"a content part of type {what}", keys)
        case "pattern":
            blank = "empty" if value == "" else "blank"
            return Finding("empty-content", f"{name} is {blank}", keys)
        case "minItems" if keys[-1] == "content":
            return Finding("empty-content", f"{name} is an empty list", keys)
        case "minItems":
            return Finding("no-messages", f"{name} is an empty list", keys)
        case _:
            return Finding("invalid-value", f"{name} is not what the schema allows", keys)


def _missing(error: ValidationError) -> Iterator[Finding]:
    """Every missing key of the object: the error stands for one of them and does not say which."""
    row, required = cast(dict[str, Any], error.instance), cast(list[str], error.validator_value)
    present = [name for name in row if name not in required]
    for key in required:
        if key in row:
            continue
        other = [name for name in _OTHER_NAMES.get(key, ()) if name in present]
        found = other or get_close_matches(key, present, 1, 0.75)
        mend = f"rename `{shown(found[0])}` to `{key}`" if found else f"add `{key}`"
        yield Finding("missing-key", f"`{key}` is missing", tuple(error.absolute_path), mend=mend)


def _wrong_type(error: ValidationError, keys: Keys, name: str, row: dict[str, Any]) -> Finding:
    wanted = cast(str | list[str], error.validator_value)
    wanted = [wanted] if isinstance(wanted, str) else wanted
    value = error.instance
    if value is None and keys[-1] == "content":
        return Finding("empty-content", f"{name} is null", keys)
    if len(keys) == 1 and keys[0] in ("prompt", "completion", "chosen", "rejected"):
        # The form of a row is that of most of its values, so this one differs from the others.
        others = [key for key in ("prompt", "completion", "chosen", "rejected") if key in row and key != keys[0]]
        if isinstance(value, str | list) and others and row.keys().isdisjoint(_NEVER_MIXED):
            rest = " and ".join(f"`{key}`" for key in others)
            message = f"{name} is {type_name(value)}, {rest} {'is' if len(others) == 1 else 'are'} not"
            return Finding("mixed-forms", message, keys)
    expected = " or ".join(_TYPES[type] for type in wanted if type != "null")
    return Finding("wrong-type", f"{name} is {type_name(value)}, not {expected}", keys)


def _unknown_role(role: Any, keys: Keys) -> Finding:
    if not isinstance(role, str):
        return Finding("wrong-type", f"`{keys[-1]}` is {type_name(role)}, not text", keys)
    lower = role.strip().lower()
    if keys[-1] == "from":
        known = lower if lower in _SHAREGPT else _SHAREGPT_ROLES.get(lower)
        usual = "use `system`, `human`, `gpt`, `function_call` or `observation`"
    else:
        known = lower if lower in ("system", "developer", "user", "assistant", "tool") else _ROLES.get(lower)
        usual = None
    mend = f"write `{known}`" if known else usual
    return Finding("unknown-role", f'unknown role "{shown(role)}"', keys, mend=mend)
