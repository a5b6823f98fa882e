"""The published schemas, read from their files, and put together into one schema for each format.

A file may refer to definitions of another by its `$id`. What is not among the files is not found: nothing is ever
fetched.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from pipeline.data.rows import Kind

_URN = "urn:preference-pipeline:schema:"
_FILES = {
    "conversational-implicit-prompt": "implicit-prompt",
    "standard-implicit-prompt": "implicit-prompt",
    "ultrafeedback-binarized": "implicit-prompt",
    "question-preference": "question-preference",
    "input-preference": "question-preference",
    "response-preference": "question-preference",
    "hh-transcripts": "hh-transcripts",
    "openai-chat": "openai-chat",
    "openai-preference": "openai-preference",
    "alpaca": "alpaca",
    "alpaca-preference": "alpaca-preference",
    "alpaca-ranked": "alpaca-ranked",
    "sharegpt": "sharegpt",
    "sharegpt-preference": "sharegpt-preference",
}
"""The file of each format; those that are not here are TRL's, in the file of their kind."""


@cache
def load_schema(name: str) -> dict[str, Any]:
    """A published schema, as it stands in its file. Its `$id` ends with its version."""
    text = (files("pipeline") / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@cache
def definition(kind: Kind, format: str) -> dict[str, Any]:
    """The schema of one format by itself, with every definition that it needs under its own `$defs`."""
    name = _FILES.get(format, kind)
    schema = load_schema(name)
    found: dict[str, Any] = {}
    if format in schema.get("$defs", {}):
        own = {"$ref": _take(name, format, found)}
    else:
        own = {key: _local(part, name, found) for key, part in schema.items() if key not in ("$schema", "$id", "$defs")}
    return {"$schema": schema["$schema"], **own, "$defs": found}


def _take(name: str, key: str, found: dict[str, Any]) -> str:
    """Puts the definition `key` of the file `name` into `found`; returns the reference to it."""
    short = f"{name}.{key}"
    if short not in found:
        found[short] = None  # a definition may refer to itself
        found[short] = _local(load_schema(name)["$defs"][key], name, found)
    return f"#/$defs/{short}"


def _local(part: Any, name: str, found: dict[str, Any]) -> Any:
    """`part` of the file `name` with its references pointing into `found`."""
    if isinstance(part, list):
        return [_local(item, name, found) for item in part]
    if not isinstance(part, dict):
        return part
    local = {key: _local(item, name, found) for key, item in part.items() if key != "$ref"}
    if reference := part.get("$ref"):
        file, _, key = reference.partition("#/$defs/")
        local["$ref"] = _take(_named(file) if file else name, key, found)
    return local


@cache
def _named(identifier: str) -> str:
    """The name of the file whose `$id` is `identifier`."""
    name = identifier.removeprefix(_URN).rpartition(":")[0]
    assert load_schema(name)["$id"] == identifier, identifier
    return name
