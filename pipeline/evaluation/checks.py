"""What is asked of an answer: that it is JSON of the right shape, has the right fields, and keeps to the
rules.

Each check is a pure function of the answer's text and the reference answer's, true or false.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from pipeline.data.strict_json import StrictJson, oddities, skip_space
from pipeline.errors import PipelineError
from pipeline.experiment import Check, Evaluation


@dataclass(frozen=True)
class Rule:
    """A regular expression that an answer must match somewhere, or nowhere."""

    pattern: re.Pattern[str]
    must_match: bool

    def holds(self, text: str) -> bool:
        """Whether `text` keeps to the rule."""
        return (self.pattern.search(text) is not None) is self.must_match


@dataclass(frozen=True)
class Phrase:
    """A text that an answer must contain, or must not."""

    text: str
    must_contain: bool

    def holds(self, text: str) -> bool:
        """Whether `text` keeps to the rule."""
        return (self.text in text) is self.must_contain


@dataclass(frozen=True)
class Words:
    """How many words an answer may have."""

    low: int
    high: float

    def holds(self, text: str) -> bool:
        """Whether `text` keeps to the rule."""
        return self.low <= len(text.split()) <= self.high


@dataclass(frozen=True)
class Same:
    """An answer must be the reference answer, white space around it aside."""


@dataclass(frozen=True)
class Checks:
    """What every answer is checked for; nothing by default."""

    validator: Validator | None = None
    """The JSON Schema that the whole answer must conform to."""
    match: tuple[str, ...] = ()
    """Fields of the JSON answer that must equal the reference's."""
    rules: Mapping[str, Rule | Phrase | Words | Same] | None = None


def checks_of(evaluation: Evaluation) -> Checks:
    """The checks that an experiment's evaluation section asks for.

    Raises:
        PipelineError: the schema file cannot be used, see `load_validator`.
    """
    schema = evaluation.output_schema
    rules = {name: _rule(check) for name, check in evaluation.checks.items()}
    return Checks(None if schema is None else load_validator(Path(schema)), tuple(evaluation.match), rules)


def _rule(check: Check) -> Rule | Phrase | Words | Same:
    pattern, phrase = check.must_match or check.must_not_match, check.must_contain or check.must_not_contain
    if pattern is not None:
        return Rule(re.compile(pattern), check.must_match is not None)
    if phrase is not None:
        return Phrase(phrase, check.must_contain is not None)
    if check.equals_reference:
        return Same()
    return Words(check.min_words or 0, math.inf if check.max_words is None else check.max_words)


def load_validator(file: Path) -> Validator:
    """A validator for the JSON Schema in `file`, which may refer to nothing outside itself.

    The draft is the one that `$schema` names, 2020-12 if none is named or known. `format` is an annotation,
    as the specification has it by default. Nothing is ever fetched.

    Raises:
        PipelineError: the file cannot be read, is no JSON Schema, or holds a reference that leads nowhere.
    """
    try:
        schema = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(schema, dict):
            raise ValueError("it holds another value")  # noqa: TRY004, TRY301
        resource = Resource.from_contents(schema, default_specification=DRAFT202012)
        validator = validator_for(schema, default=Draft202012Validator)
        validator.check_schema(schema)
        _resolve_all(resource, Registry().resolver_with_root(resource))
    except OSError as error:
        raise _bad_schema(file, f"cannot be read: {error.strerror}", "check `evaluation.output_schema`") from error
    except ValueError as error:
        raise _bad_schema(file, f"is no JSON object: {error}", "write the schema as one JSON object") from error
    except SchemaError as error:
        where = f"{error.json_path} {' '.join(error.message.split())}"
        raise _bad_schema(file, f"is no JSON Schema: {where}", "see https://json-schema.org") from error
    except Unresolvable as error:
        raise _bad_schema(
            file,
            f"refers to {error.ref}, which is not in it",
            "copy that schema into its `$defs`: nothing is fetched",
        ) from error
    return validator(schema, registry=Registry())


def _bad_schema(file: Path, message: str, mend: str) -> PipelineError:
    return PipelineError(f"the output schema {message}", code="bad-output-schema", file=file, mend=mend)


def _resolve_all(resource: Resource[Any], resolver: Any) -> None:
    # Found here, before an hour of answers is generated, rather than at the first answer that reaches it.
    if isinstance(resource.contents, Mapping):
        for keyword in ("$ref", "$dynamicRef"):
            if keyword in resource.contents:
                resolver.lookup(resource.contents[keyword])
    for subresource in resource.subresources():
        _resolve_all(subresource, resolver.in_subresource(subresource))


def check_answer(text: str, reference: str | None, checks: Checks) -> dict[str, bool]:
    """Every check that applies to one answer, by its metric's name.

    `json_conformance`: the whole text, white space around it aside, is strict JSON (see `parse_json`) and
    conforms to the schema. `match/<field>`: the answer is a JSON object whose field equals the reference's;
    it applies where the reference is a JSON object with that field. `check/<name>`: the rule holds; one that asks for
    the reference answer applies where there is one.
    """
    answer = _parsed(text)
    results = {}
    if checks.validator is not None:
        results["json_conformance"] = answer is not _UNPARSABLE and checks.validator.is_valid(answer)
    expected = _UNPARSABLE if reference is None else _parsed(reference)
    for field in checks.match:
        if isinstance(expected, dict) and field in expected:
            results[f"match/{field}"] = (
                isinstance(answer, dict) and field in answer and _equal(answer[field], expected[field])
            )
    for name, rule in (checks.rules or {}).items():
        if not isinstance(rule, Same):
            results[f"check/{name}"] = rule.holds(text)
        elif reference is not None:
            results[f"check/{name}"] = text.strip() == reference.strip()
    return results


def require_references(references: Sequence[str | None], checks: Checks) -> None:
    """Refuses a field to match that no reference answer has: it would be measured on nothing.

    Raises:
        PipelineError: the first such field.
    """
    parsed = [_parsed(reference) for reference in references if reference is not None]
    for index, field in enumerate(checks.match):
        if not any(isinstance(reference, dict) and field in reference for reference in parsed):
            raise PipelineError(
                f"no reference answer is a JSON object with the field `{field}`",
                code="unknown-match-field",
                pointer=f"/evaluation/match/{index}",
                mend="name a field of the JSON answers in `evaluation.prompts`, or take it out of the list",
            )


def parse_json(text: str) -> Any:
    """`text` as one JSON value under the rules that rows are read by (`pipeline.data.strict_json`).

    Raises:
        ValueError: it is not that.
    """
    parsed = StrictJson().parse(text, 0)
    if skip_space(text, parsed.end) < len(text):
        raise ValueError("something follows the JSON value")
    finding = next(oddities(text, 0), None) if parsed.odd else None
    if finding is not None:
        raise ValueError(finding.message)
    return parsed.value


_UNPARSABLE = object()


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return _UNPARSABLE


def _equal(first: Any, second: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are equal, 1 and true are not (in Python they are)."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)
