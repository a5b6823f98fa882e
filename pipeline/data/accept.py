"""Says yes at once to most rows that conform to a schema; says nothing of the others.

`jsonschema` decides, and takes some 150 microseconds for a row of 2 kB. `jsonschema-rs` takes one, but departs from it
where the two regular expression engines differ, and cannot take every value that Python's reader yields. So its yes
counts only for schemas made of keywords that leave no room for another opinion, with patterns spelled out character
by character; whatever it refuses, or cannot take, is decided by `jsonschema`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema_rs

Accepts = Callable[[Any], bool]

_SCHEMAS = ("if", "then", "else", "not", "items", "additionalProperties", "contains", "propertyNames")
_LISTS = ("anyOf", "allOf", "oneOf")
_OBJECTS = ("properties", "$defs")
_PLAIN = {"$schema", "$id", "$comment", "title", "description", "examples", "default"} | {
    *("required", "minItems", "maxItems", "minLength", "dependentRequired")
}


class _UnclearError(ValueError):
    """A keyword or a pattern on which the two might differ."""


def fast_accept(schema: dict[str, Any]) -> Accepts:
    """A function that is true only for values that conform to `schema`, and false for all others and for some that do.

    For a schema with a keyword on which the two libraries might differ, it is always false.

    Args:
        schema: Draft 2020-12, referring to nothing outside itself.
    """
    try:
        validator = jsonschema_rs.Draft202012Validator(_plain(schema), retriever=_refuse)
    except (_UnclearError, ValueError, jsonschema_rs.ReferencingError):
        return _never

    def accepts(value: Any) -> bool:
        try:
            return validator.is_valid(value)
        except Exception:  # half a surrogate pair, NaN, too deep, too large: not for this library
            return False

    return accepts


def _never(_: Any) -> bool:
    return False


def _refuse(uri: str) -> Any:
    raise _UnclearError(uri)


def _plain(schema: Any) -> Any:
    """The schema with every pattern spelled out.

    Raises:
        _UnclearError: the schema has something else in it than what both libraries take alike.
    """
    if isinstance(schema, bool):
        return schema
    plain: dict[str, Any] = {}
    for key, part in schema.items():
        if key in _SCHEMAS:
            plain[key] = _plain(part)
        elif key in _LISTS:
            plain[key] = [_plain(one) for one in part]
        elif key in _OBJECTS:
            plain[key] = {name: _plain(one) for name, one in part.items()}
        elif key == "pattern":
            plain[key] = _spelled_out(part)
        elif key in _PLAIN or (key == "$ref" and part.startswith("#/$defs/")) or _known_values(key, part):
            plain[key] = part
        else:
            raise _UnclearError(key)
    return plain


def _known_values(key: str, part: Any) -> bool:
    """Whether this is `const` or `enum` of texts, nulls and small integers, or a `type` but `integer`.

    Equality of other numbers, and what an integer is, are a wide field; that a small one equals the same number written
    as a float, and neither true nor false, is the same to both (the tests try every odd number).
    """
    if key == "type":
        return "integer" not in part
    values = part if key == "enum" else [part] if key == "const" else [0.5]
    return all(
        value is None or isinstance(value, str) or (type(value) is int and abs(value) < 2**31) for value in values
    )


@cache
def _spelled_out(pattern: str) -> str:
    r"""A negated character class, as `[^\s\u200b]`, with each character by number: `\s` is not the same for all."""
    if not re.fullmatch(r"\[\^(?:[^\[\]^\\&~|]|\\s|\\u[0-9a-f]{4})+\]", pattern):
        raise _UnclearError(pattern)
    excluded = re.compile("[" + pattern[2:])
    characters = excluded.findall("".join(map(chr, range(sys.maxunicode + 1))))
    return "[^" + "".join(f"\\x{{{ord(one):x}}}" for one in characters) + "]"
