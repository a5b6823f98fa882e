from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.evaluation.checks import (
    Checks,
    Rule,
    check_answer,
    checks_of,
    load_validator,
    parse_json,
    require_references,
)
from pipeline.experiment import Check, Evaluation

SCHEMA = {
    "type": "object",
    "properties": {"severity": {"enum": ["low", "high"]}, "items": {"$ref": "#/$defs/items"}},
    "required": ["severity"],
    "additionalProperties": False,
    "$defs": {"items": {"type": "array", "items": {"type": "number"}}},
}


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return file


@pytest.mark.parametrize(
    ("text", "conforms"),
    [
        ('{"severity": "low"}', True),
        (' \n{"severity": "low", "items": [1, 2.5]}\n', True),
        ('{"severity": "medium"}', False),
        ('{"severity": "low", "items": ["1"]}', False),
        ('{"severity": "low", "other": 1}', False),
        ("{}", False),
        ('"low"', False),
        ('Sure! {"severity": "low"}', False),
        ('{"severity": "low"} Anything else?', False),
        ('```json\n{"severity": "low"}\n```', False),
        ('{"severity": "low"', False),
        ("{'severity': 'low'}", False),
        ('{"severity": "low", "items": [NaN]}', False),
        ('{"severity": "low", "items": [-Infinity]}', False),
        ('{"severity": "low", "items": [1e999]}', False),
        ('{"severity": "high", "severity": "low"}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json_conformance(schema_file: Path, text: str, conforms: bool) -> None:
    checks = Checks(validator=load_validator(schema_file))
    assert check_answer(text, None, checks) == {"json_conformance": conforms}


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ('{"f": "a", "g": 1}', '{"f": "a", "g": 2}', True),
        ('{"f": "A"}', '{"f": "a"}', False),
        ('{"f": 1.0}', '{"f": 1}', True),
        ('{"f": true}', '{"f": 1}', False),
        ('{"f": 0}', '{"f": false}', False),
        ('{"f": null}', '{"f": null}', True),
        ("{}", '{"f": null}', False),
        ('{"f": [1, {"x": true}]}', '{"f": [1, {"x": true}]}', True),
        ('{"f": [1, {"x": 1}]}', '{"f": [1, {"x": true}]}', False),
        ('{"f": [1, 2]}', '{"f": [2, 1]}', False),
        ('{"f": [1]}', '{"f": [1, 1]}', False),
        ('{"f": {"a": 1, "b": 2}}', '{"f": {"b": 2, "a": 1}}', True),
        ('{"f": {"a": 1}}', '{"f": {"a": 1, "b": 2}}', False),
        ('["f"]', '{"f": "a"}', False),
        ("no JSON", '{"f": "a"}', False),
    ],
)
def test_match(answer: str, reference: str, equal: bool) -> None:
    assert check_answer(answer, reference, Checks(match=("f",))) == {"match/f": equal}


@pytest.mark.parametrize("reference", [None, "no JSON", "[1]", '{"g": 1}'])
def test_match_applies_where_the_reference_has_the_field(reference: str | None) -> None:
    assert check_answer('{"f": 1}', reference, Checks(match=("f",))) == {}


def test_rules() -> None:
    rules = {
        "greets": Rule(re.compile("(?i)hello"), must_match=True),
        "no_promise": Rule(re.compile(r"\bwill\b"), must_match=False),
    }
    checks = Checks(rules=rules)
    assert check_answer("Well, HELLO", None, checks) == {"check/greets": True, "check/no_promise": True}
    assert check_answer("It will work", None, checks) == {"check/greets": False, "check/no_promise": False}


def test_from_the_experiment(schema_file: Path) -> None:
    evaluation = Evaluation(
        output_schema=str(schema_file),
        match=["severity"],
        checks={"polite": Check(must_match="please"), "calm": Check(must_not_match="!")},
    )
    text = '{"severity": "low"}'
    assert check_answer(text, '{"severity": "high"}', checks_of(evaluation)) == {
        "json_conformance": True,
        "match/severity": False,
        "check/polite": False,
        "check/calm": True,
    }
    assert check_answer(text, text, checks_of(Evaluation())) == {}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objekt"}, "is no JSON Schema: $.type"),
        ({"$ref": "https://example.com/other.json"}, "refers to https://example.com/other.json"),
        ({"properties": {"a": {"items": {"$ref": "#/$defs/missing"}}}}, "refers to /$defs/missing"),
    ],
)
def test_schemas_that_are_refused_before_anything_is_asked(
    schema_file: Path, schema: dict[str, Any], says: str
) -> None:
    schema_file.write_text(json.dumps(schema))
    with pytest.raises(PipelineError) as raised:
        load_validator(schema_file)
    assert says in raised.value.message
    assert (raised.value.code, raised.value.file) == ("bad-output-schema", str(schema_file))


def test_schema_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be read: No such file"):
        load_validator(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"type": "object",}')
    with pytest.raises(PipelineError, match="is no JSON object"):
        load_validator(tmp_path / "broken.json")
    (tmp_path / "number.json").write_text("5")
    with pytest.raises(PipelineError, match="is no JSON object"):
        load_validator(tmp_path / "number.json")


def test_a_schema_is_read_as_the_draft_it_names(schema_file: Path) -> None:
    """In draft 7 a list under `items` is a tuple; in 2020-12 it is no schema at all."""
    tuples = {"items": [{"type": "string"}, {"type": "number"}]}
    schema_file.write_text(json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **tuples}))
    checks = Checks(validator=load_validator(schema_file))
    assert check_answer('["a", 1]', None, checks) == {"json_conformance": True}
    assert check_answer('[1, "a"]', None, checks) == {"json_conformance": False}
    schema_file.write_text(json.dumps(tuples))
    with pytest.raises(PipelineError):
        load_validator(schema_file)


def test_a_field_that_no_reference_has() -> None:
    checks = Checks(match=("severity", "componnent"))
    references = [None, "plain", '{"severity": "low", "component": "printer"}']
    with pytest.raises(PipelineError, match="`componnent`") as raised:
        require_references(references, checks)
    assert raised.value.pointer == "/evaluation/match/1"
    require_references(references, Checks(match=("severity", "component")))


def test_strict_json_keeps_what_json_can_say() -> None:
    assert parse_json('{"a": [1, 2.5, "x", null, true]}') == {"a": [1, 2.5, "x", None, True]}


@pytest.mark.parametrize(
    ("check", "text", "holds"),
    [
        ({"must_contain": "a.c"}, "say a.c now", True),
        ({"must_contain": "a.c"}, "say abc now", False),  # letter for letter, no pattern
        ({"must_not_contain": "(soon"}, "soon", True),
        ({"must_not_contain": "(soon"}, "(soon)", False),
        ({"min_words": 2}, "one  two\nthree", True),
        ({"min_words": 4}, "one  two\nthree", False),
        ({"max_words": 3}, "one  two\nthree", True),
        ({"max_words": 2}, "one  two\nthree", False),
        ({"min_words": 1, "max_words": 2}, "", False),
        ({"equals_reference": True}, " The answer.\n", True),
        ({"equals_reference": True}, "the answer.", False),
    ],
)
def test_every_kind_of_check(check: dict[str, Any], text: str, holds: bool) -> None:
    checks = checks_of(Evaluation.model_validate({"checks": {"it": check}}))
    assert check_answer(text, "The answer.", checks) == {"check/it": holds}


def test_equality_needs_something_to_equal() -> None:
    checks = checks_of(Evaluation.model_validate({"checks": {"it": {"equals_reference": True}}}))
    assert check_answer("x", None, checks) == {}
