"""Unquoted YAML scalars as values, and the traps among them.

YAML 1.1, which PyYAML and most Python tools read, takes `no` for false, `1e-5` for text, `12:30` for 750 and
`010` for 8; YAML 1.2, which editors read, takes none of them so. In a file, what the two read differently is
a trap, not a value; only `yes`, `no`, `on` and `off` pass as booleans, and the type of the field tells where
text was meant. An override on the command line is read by YAML 1.2's rules.
"""

from __future__ import annotations

import math
import re

Scalar = str | int | float | bool | None

_TAG = "tag:yaml.org,2002:"
_NUMBER_1_2 = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WHOLE_1_2 = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST = 40
"""Characters of the longest whole number that is read: Python takes quadratic time over more, and no key asks."""
_OCTAL_1_1 = re.compile(r"[-+]?0[0-7_]+")


class TrapError(Exception):
    """A scalar that cannot be taken at its word."""

    def __init__(self, code: str, cause: str, mend: str) -> None:
        super().__init__(cause)
        self.code = code
        self.cause = cause
        self.mend = mend


def needs_quotes(text: str) -> bool:
    """Whether YAML 1.2 reads plain `text` as a number, whatever YAML 1.1 does."""
    return bool(_NUMBER_1_2.fullmatch(text) or _WHOLE_1_2.fullmatch(text))


def plain_1_1(text: str, tag: str) -> Scalar:
    """An unquoted scalar in a file.

    Args:
        text: as written.
        tag: what PyYAML's resolver, which follows YAML 1.1, takes it for.

    Raises:
        TrapError: where YAML 1.2 reads something else, or the value is of no use.
    """
    kind = tag.removeprefix(_TAG)
    quoted = f'"{text}" with quotes where text is meant'
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in {"yes", "true", "on"}
    if kind == "timestamp":
        raise TrapError("yaml-date", f"YAML reads `{text}` as a date", f'quote it: "{text}"')
    if kind in {"int", "float"} and ":" in text:
        cause = f"YAML 1.1 reads `{text}` as {_base_60(text):g}, in base 60"
        raise TrapError("yaml-sexagesimal", cause, f"write {quoted}")
    if kind == "int" and len(text) <= _LONGEST and _OCTAL_1_1.fullmatch(text):
        cause = f"YAML 1.1 reads `{text}` as {int(text.replace('_', ''), 8)}, in base 8"
        raise TrapError("yaml-octal", cause, f"write it without leading zeros, or {quoted}")
    if kind == "int":
        return _whole(text, text.replace("_", ""))
    if kind == "float":
        return _finite(text.replace("_", ""))
    if needs_quotes(text):
        code = "yaml-float" if "e" in text.lower() else "yaml-number"
        cause = f"YAML 1.1 reads `{text}` as text, YAML 1.2 as a number"
        raise TrapError(code, cause, f"write {number_1_1(text)} where a number is meant, {quoted}")
    return text


def plain_1_2(text: str) -> Scalar:
    """An unquoted scalar on the command line, by YAML 1.2's core schema.

    Raises:
        TrapError: where the value is of no use.
    """
    if text in {"", "~", "null", "Null", "NULL"}:
        return None
    if text in {"true", "True", "TRUE", "false", "False", "FALSE"}:
        return text.lower() == "true"
    if _WHOLE_1_2.fullmatch(text):
        return _whole(text, text if text[:2] in {"0o", "0x"} else re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text))
    if _NUMBER_1_2.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        return _finite(text)
    return text


def _whole(text: str, digits: str) -> int:
    try:
        if len(digits) <= _LONGEST:
            return int(digits, 0)
    except ValueError:  # `0x_`
        pass
    raise TrapError("out-of-range", f"`{text[:_LONGEST]}` is no usable number", "give a shorter number")


def _finite(text: str) -> float:
    number = math.inf if _NOT_FINITE.fullmatch(text) else float(text)
    if math.isinf(number):
        raise TrapError("out-of-range", f"`{text[:40]}` is not a finite number", "give a finite number")
    return number


def _base_60(text: str) -> float:
    total = 0.0
    for part in text.replace("_", "").lstrip("+-").split(":"):
        total = total * 60 + float(part)
    return -total if text.startswith("-") else total


def number_1_1(text: str) -> str:
    """A number that YAML 1.2 reads, in the form that YAML 1.1 reads too: `1e-5` becomes `1.0e-5`."""
    if _WHOLE_1_2.fullmatch(text):
        return text if len(text) > _LONGEST else str(plain_1_2(text))
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    mantissa = f"{whole}{'' if whole[-1:].isdigit() else '0'}.{fraction or '0'}"
    if not exponent:
        return mantissa
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"
