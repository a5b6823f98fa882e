"""What is wrong with an experiment's values, in words, from what its typed definition says of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import PipelineError
from pipeline.experiment_keys import mend_for
from pipeline.redaction import hide
from pipeline.yaml_places import Place, pointer_to
from pipeline.yaml_scalars import needs_quotes, number_1_1

Keys = tuple[str | int, ...]

MAX_PROBLEMS = 100
"""So many are worded, with suggestions; a file with more is something else."""

_WANTED = {
    "string_type": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
}
_RANGES = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_PATTERNS: dict[str | int, tuple[str, str]] = {
    "key_env": (
        "`key_env` must be the name of an environment variable: capitals, digits and `_`",
        "name the variable that holds the key, such as OPENAI_API_KEY; the key itself belongs nowhere in an experiment",
    ),
    "base_url": (
        "`base_url` must be an address that begins with http:// or https://, without user name, password or query",
        "give the address alone; the key goes into the environment variable that `key_env` names",
    ),
}
_WORDS = {"yes", "no", "on", "off"}


def problems_of(error: ValidationError, value: Any, places: Mapping[str, Place]) -> list[PipelineError]:
    """The problems that `error` reports of `value`, one a place, with pointer but without file and line.

    Args:
        error: raised by the typed definition.
        value: what it was raised for, as read.
        places: where each value was written.
    """
    found: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path_of(detail, value), []).append(detail)
    around = {path[:length] for path in found for length in range(len(path))}
    problems: list[PipelineError] = []
    for path, details in found.items():
        if path in around and isinstance(_at(value, path), list):
            continue  # `name | list of names` complains of the list as a name too; its items say more
        if len(problems) == MAX_PROBLEMS:
            rest = f"there are more problems than these {MAX_PROBLEMS}"
            mend = "is this an experiment file?"
            problems.append(PipelineError(rest, code="too-many", mend=mend))
            break
        cause, code, mend = _say(path, details, value, places.get(pointer_to(*path), Place()))
        problems.append(PipelineError(cause, code=code, mend=mend, pointer=pointer_to(*path)))
    return problems


def placed(problem: PipelineError, places: Mapping[str, Place], file: str | None) -> PipelineError:
    """`problem` with the file and line of its pointer, or of the section around it, or its `--set`."""
    if problem.pointer is None:
        return problem
    pointer = problem.pointer
    while pointer not in places and pointer:
        pointer = pointer.rpartition("/")[0]
    place = places.get(pointer, Place())
    if place.override is not None:
        problem.message = f"`--set {hide(place.override)}`: {problem.message}"
    else:
        problem.file = file
        problem.line = place.line if problem.line is None else problem.line
    return problem


def _path_of(detail: ErrorDetails, value: Any) -> Keys:
    """The keys that lead to what `detail` is about: its `loc` without the names of a union's members."""
    path: list[Any] = []
    for part in detail["loc"]:
        named = isinstance(value, dict) and part in value
        if named or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
            path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return (*path, *detail.get("ctx", {}).get("at", ()))


def _at(value: Any, path: Keys) -> Any:
    """What stands at `path` in `value`; None where nothing does."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _say(path: Keys, details: Sequence[ErrorDetails], whole: Any, place: Place) -> tuple[str, str, str]:
    """Cause, code and mend of what is wrong at `path`, by the first kind below that `details` hold."""
    kinds = {detail["type"]: detail for detail in details}
    key, value = _name(path), _at(whole, path)
    if "string_pattern_mismatch" in kinds and path[-1] in _PATTERNS:
        cause, mend = _PATTERNS[path[-1]]  # what was written there may be a secret
        return cause, "out-of-range", mend
    if "string_pattern_mismatch" in kinds:
        cause = f"`{value if isinstance(value, str) else path[-1]}` is not a name"
        mend = "a name has 1 to 64 letters, digits, `_`, `-` and `.`, and does not start with a dot"
        return cause, "out-of-range", mend
    for detail in details:
        ours = detail.get("ctx", {})
        if "mend" in ours:
            return ours["cause"], detail["type"], ours["mend"]
    if "extra_forbidden" in kinds:
        *section, unknown = [str(part) for part in path]
        full = place.override is not None
        shown = ".".join((*section, unknown)) if full else unknown
        return f"unknown key `{shown}`", "unknown-key", mend_for(section, unknown, full=full)
    if "missing" in kinds:
        section_name = ".".join(str(part) for part in path[:-1])
        return f"{key} is missing", "missing-key", f"add `{path[-1]}:` {_under(section_name)}"
    if "too_short" in kinds:
        return f"{key} is an empty list", "conflict", "name at least one, or remove the line"
    if "string_too_short" in kinds:
        return f"{key} is empty text", "out-of-range", "give a value, or remove the line"
    for kind in _RANGES & kinds.keys():
        bound = kinds[kind]["msg"].removeprefix("Input should be ")
        return f"{key} must be {bound}; got {value}", "out-of-range", f"give a number that is {bound}"
    return _wrong_type(path, details, value, place)


def _wrong_type(path: Keys, details: Sequence[ErrorDetails], value: Any, place: Place) -> tuple[str, str, str]:
    key, kinds = _name(path), {detail["type"] for detail in details}
    choices = [
        choice
        for detail in details
        if detail["type"] == "literal_error"
        for choice in re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    ]
    wanted = [f"one of {', '.join(choices)}"] if choices else []
    wanted += [_WANTED[kind] for kind in _WANTED if kind in kinds and not (choices and _WANTED[kind] == "text")]
    expected = " or ".join(dict.fromkeys(wanted))
    must = f"{key} must be {expected}" if expected else f"{key}: {details[0]['msg']}"
    written = place.text if place.text is not None else str(value)
    if choices and isinstance(value, str | int | float) and (isinstance(value, str) or written not in choices):
        close = difflib.get_close_matches(written.lower(), choices, n=1, cutoff=0.5)
        mend = f"did you mean `{close[0]}`?" if close else "write one of them"
        return f"{must}; got `{written}`", "unknown-value", mend
    if choices or "string_type" in kinds:
        if isinstance(value, bool) and written.lower() in _WORDS:
            cause = f"{must}; YAML 1.1 reads `{written}` as {str(value).lower()}"
            return cause, "yaml-bool", f"quote it: {_assignment(path, place, _quoted(written))}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            cause = f"{must}; YAML reads `{written}` as a number"
            return cause, "yaml-number", f"quote it: {_assignment(path, place, _quoted(written))}"
    if isinstance(value, str) and kinds & {"int_type", "float_type"} and needs_quotes(value):
        mend = f"remove the quotes: {_assignment(path, place, number_1_1(value))}"
        return f"{must}; got the text `{value}` in quotes", "wrong-type", mend
    mend = f"give {expected}"
    if value is None:
        mend = "give it a value, or remove the line"
    elif kinds == {"int_type"} and isinstance(value, float) and value.is_integer():
        mend = f"write {int(value)}"
    elif kinds == {"list_type"}:
        mend = f"write [{written}]"
    return f"{must}; got {_shown(value)}", "wrong-type", mend


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text `{value[:60]}`"
    if isinstance(value, int | float):
        return str(value)
    return "a list" if isinstance(value, list) else "a section of keys"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _assignment(path: Keys, place: Place, text: str) -> str:
    """How what stands at `path` is given `text`: in a file, or on the command line."""
    if place.override is not None:
        setting = f"{'.'.join(map(str, path))}={text}"
        return f"--set '{setting}'" if '"' in text else f"--set {setting}"
    return f"{path[-1]}: {text}" if path and isinstance(path[-1], str) else text


def _name(path: Keys) -> str:
    if path and isinstance(path[-1], int):
        return f"item {path[-1] + 1} of {_name(path[:-1])}"
    return f"`{path[-1] if path else 'experiment'}`"


def _under(section: str) -> str:
    return f"under `{section}`" if section else "at the top level"
