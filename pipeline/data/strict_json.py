"""JSON read strictly (RFC 8259 and what I-JSON, RFC 7493, adds), with the place of every value on demand.

The standard library's C scanner does the reading. Its hooks note that something is odd but not where, so a
row that turns out odd is walked once more in Python, where places are known. Good rows never pay for that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out
from typing import Any, NamedTuple

from pipeline.data.place import Finding, Keys, shown

MAX_DEPTH = 64
"""Objects and arrays that may stand inside each other in one row."""

_INT64_DIGITS = 18
"""Any integer with no more digits than this fits into 64 bits."""
_ODD_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN = re.compile(r'[ \t\n\r,:]*([\[\]{}"]|[^ \t\n\r,:\[\]{}"]+)')
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonError(ValueError):
    """The text is not JSON, or is nested beyond what can be read.

    Args:
        finding: what is wrong and at which offset.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Parsed(NamedTuple):
    """A JSON value, and what of it deserves a second look."""

    value: Any
    end: int
    odd: bool
    """Whether `oddities` has to be asked: something in the text is legal for Python alone, or may be."""


class StrictJson:
    """Reads one JSON value after another."""

    def __init__(self) -> None:
        self._odd = False
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._int,
            parse_float=self._float,
        )

    def parse(self, text: str, start: int) -> Parsed:
        """The value that begins at `start`, after spaces.

        Raises:
            JsonError: the text is no JSON value, with the offset at which it stops being one.
        """
        start = skip_space(text, start)
        self._odd = False
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            if text[error.pos : error.pos + 1] == "\0":
                message = "a NUL character in the text"
                raise JsonError(Finding("nul-character", message, None, error.pos)) from None
            cause = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
            raise JsonError(Finding("invalid-json", f"not valid JSON: {cause}", None, error.pos)) from None
        except RecursionError:
            raise JsonError(_too_deep(None, start)) from None
        # Counting brackets is fast, and a row with few of them cannot be nested deeply.
        if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH:
            self._odd = True
        if text.find("\\", start, end) >= 0 and _ODD_ESCAPE.search(text, start, end):
            self._odd = True
        return Parsed(value, end, self._odd)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            self._odd = True
        return value

    def _constant(self, _: str) -> None:
        self._odd = True

    def _int(self, digits: str) -> int:
        if len(digits) <= _INT64_DIGITS:
            return int(digits)
        self._odd = True
        return int(digits) if _fits(digits) else 0  # `int` itself refuses thousands of digits

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._odd = True
        return value


def skip_space(text: str, start: int) -> int:
    """The offset of the first character from `start` on that is no JSON white space."""
    if text[start : start + 1] > " ":
        return start
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


@dataclass(slots=True)
class _Container:
    """An object or array that the walk is inside of."""

    key: str | int | None
    """The key or index of the value being walked; None between the entries of an object."""
    seen: set[str] = field(default_factory=set)


class _Token(NamedTuple):
    """A value, or a key, met on the walk; the way to it is `[container.key for container in stack]`."""

    stack: list[_Container]
    offset: int
    text: str
    """The first character of an object, array; the text of a string, a key, a number or a literal."""
    type: str
    """`open`, `string`, `atom`, `key`, or `again` for a key that its object already has."""


def _walk(text: str, start: int) -> Iterator[_Token]:
    """Every value and key of the JSON value at `start`, in order. The text is known to be JSON."""
    stack: list[_Container] = []
    position = start
    while True:
        match = _TOKEN.match(text, position)
        assert match is not None, "walked off the end of a JSON text"
        part, offset, position = match[1], match.start(1), match.end()
        if part in ("{", "["):
            yield _Token(stack, offset, part, "open")
            stack.append(_Container(0 if part == "[" else None))
            continue
        if part in ("}", "]"):
            stack.pop()
        elif part == '"':
            part, position = scanstring(text, offset + 1)
            if stack and stack[-1].key is None:
                container = stack[-1]
                container.key = part
                yield _Token(stack, offset, part, "again" if part in container.seen else "key")
                container.seen.add(part)
                continue
            yield _Token(stack, offset, part, "string")
        else:
            yield _Token(stack, offset, part, "atom")
        if not stack:
            return
        last = stack[-1]
        last.key = last.key + 1 if isinstance(last.key, int) else None


def _keys(stack: list[_Container]) -> Keys:
    return tuple(container.key for container in stack if container.key is not None)


def locate(text: str, start: int, wanted: set[Keys]) -> dict[Keys, int]:
    """The offsets at which the `wanted` values of the JSON value at `start` stand."""
    found: dict[Keys, int] = {}
    depths = {len(keys) for keys in wanted}
    for token in _walk(text, start):
        if token.type in ("key", "again") or len(token.stack) not in depths:
            continue
        if (keys := _keys(token.stack)) in wanted:
            found[keys] = token.offset  # of several equal keys the last counts, as it does for the reader
    return found


def oddities(text: str, start: int) -> Iterator[Finding]:
    """What Python's reader accepts in the JSON value at `start` and we do not."""
    for token in _walk(text, start):
        if token.type == "open" and len(token.stack) == MAX_DEPTH:
            yield _too_deep(_keys(token.stack), token.offset)
            return
        if problem := _oddity(token):
            yield Finding(*problem, keys=_keys(token.stack), offset=token.offset)


def _oddity(token: _Token) -> tuple[str, str] | None:
    """Code and message."""
    if token.type == "again":
        return "duplicate-key", f"the key `{shown(token.text)}` stands twice in one object"
    if token.type in ("string", "key"):
        what = "a key" if token.type == "key" else "the text"
        if "\0" in token.text:
            return "nul-character", f"{what} has a NUL character in it"
        if _SURROGATE.search(token.text):
            return "unpaired-surrogate", f"{what} has half of a surrogate pair in it"
    elif token.type == "atom":
        if token.text in ("NaN", "Infinity", "-Infinity"):
            return "not-a-number", f"{token.text} is not a JSON value"
        if token.text[-1].isdigit() and not _fits(token.text):
            return "number-out-of-range", f"{shown(token.text)} does not fit into 64 bits"
    return None


def _fits(digits: str) -> bool:
    if not digits.lstrip("-").isdigit():
        return math.isfinite(float(digits))
    # Unsigned 64-bit integers are common as identifiers and hashes.
    return len(digits) <= 20 and -(2**63) <= int(digits) < 2**64


def _too_deep(keys: Keys | None, offset: int) -> Finding:
    return Finding("nesting-too-deep", f"nested more than {MAX_DEPTH} levels deep", keys, offset)
