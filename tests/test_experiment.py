"""The typed definition: exact types, ranges, and the conflicts between keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from pipeline.experiment import Dpo, Experiment, Sft
from pipeline.experiment_schema import experiment_schema

SCHEMAS = Path(__file__).parent.parent / "schemas"


def experiment(**sections: Any) -> Experiment:
    return Experiment.model_validate({"name": "x", **sections})


def errors(**sections: Any) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as caught:
        experiment(**sections)
    return [(error["type"], ".".join(map(str, error["loc"]))) for error in caught.value.errors()]


def test_everything_but_the_name_has_a_default() -> None:
    made = experiment()
    assert (made.dpo.beta, made.dpo.learning_rate, made.sft.learning_rate) == (0.1, 5e-5, 2e-4)
    assert made.scope.lora.target_modules == "all-linear"
    assert errors(name=".hidden") == [("string_pattern_mismatch", "name")]


def test_a_name_is_one_folder_below_the_runs() -> None:
    for name in ("a", "A-1_b.c", "x" * 64, "-", "a..b"):
        assert experiment(name=name).name == name
    for name in ("", ".", "..", ".a", "a/b", "/a", "a\\b", "a b", "a\n", "a\0", "ä", "x" * 65):
        assert [place for _, place in errors(name=name)] == ["name"], name


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dpo", "beta", "0.1"),
        ("dpo", "beta", True),
        ("sft", "max_length", 8.0),
        ("sft", "max_length", "8"),
        ("sft", "max_length", True),
        ("model", "trust_remote_code", "yes"),
        ("model", "trust_remote_code", 1),
        ("model", "revision", 1),
    ],
)
def test_nothing_is_converted(section: str, key: str, value: Any) -> None:
    assert [place for _, place in errors(**{section: {key: value}})] == [f"{section}.{key}"]


def test_an_int_is_fine_where_a_number_is_wanted() -> None:
    beta = experiment(dpo={"beta": 1}).dpo.beta
    assert beta == 1.0
    assert isinstance(beta, float)


@pytest.mark.parametrize("steps", [0, -2])
def test_max_steps_is_positive_or_minus_one(steps: int) -> None:
    assert [place for _, place in errors(sft={"max_steps": steps})] == ["sft.max_steps"]
    assert experiment(sft={"max_steps": -1}).sft.max_steps == -1


def test_a_stage_without_held_out_rows_is_not_evaluated() -> None:
    data = {"demonstrations": {"train": "a", "eval": "b"}, "preferences": {"train": "c"}}
    made = experiment(data=data)
    assert (made.sft.eval_strategy, made.dpo.eval_strategy) == ("epoch", "no")
    assert Sft().eval_strategy == "epoch", "the default itself is untouched"
    assert experiment(data=data, dpo={"eval_strategy": "no"}).dpo.eval_strategy == "no"


@pytest.mark.parametrize(
    ("sections", "at"),
    [
        ({"sft": {"eval_strategy": "epoch"}}, ("sft", "eval_strategy")),
        (
            {"data": {"preferences": {"train": "a"}}, "dpo": {"eval_strategy": "steps", "eval_steps": 5}},
            ("dpo", "eval_strategy"),
        ),
        ({"sft": {"save_strategy": "steps"}}, ("save_strategy",)),
        ({"sft": {"save_steps": 5}}, ("save_steps",)),
        ({"sft": {"eval_steps": 5}}, ("eval_steps",)),
        ({"dpo": {"loss_weights": [1.0, 2.0]}}, ("loss_weights",)),
        ({"dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}}, ("loss_weights",)),
        ({"dpo": {"loss_type": "exo_pair"}}, ("loss_type",)),
        ({"dpo": {"loss_type": "exo_pair", "label_smoothing": 0.0}}, ("label_smoothing",)),
        ({"dpo": {"label_smoothing": 0.1}}, ("label_smoothing",)),
        (
            {"dpo": {"loss_type": "apo_zero", "options": {"f_divergence_type": "js_divergence"}}},
            ("options", "f_divergence_type"),
        ),
        ({"dpo": {"loss_type": ["sigmoid", "aot"], "options": {"use_weighting": True}}}, ("options", "use_weighting")),
        ({"dpo": {"loss_type": ["sft", "sigmoid", "sft"]}}, ("loss_type",)),
        ({"dpo": {"loss_type": ["sft", "sigmoid"], "loss_weights": [0, 0.0]}}, ("loss_weights",)),
        ({"dpo": {"options": {"discopop_tau": 0.1}}}, ("options", "discopop_tau")),
        ({"dpo": {"options": {"f_alpha_divergence_coef": 0.3}}}, ("options", "f_alpha_divergence_coef")),
        ({"dpo": {"adapter": "frozen"}}, ("dpo", "adapter")),
        ({"dpo": {"adapter": "new"}, "scope": {"lora": None}}, ("dpo", "adapter")),
        ({"dpo": {"adapter": "new"}, "scope": {"lora": {"use_dora": True}}}, ("scope", "lora", "use_dora")),
        (
            {"dpo": {"adapter": "frozen", "unfreeze": {"lm_head": True}}, "scope": {"lora": {"use_dora": True}}},
            ("scope", "lora", "use_dora"),
        ),
        ({"dpo": {"adapter": "new"}, "scope": {"lora": {"bias": "all"}}}, ("scope", "lora", "bias")),
        ({"scope": {"lora": None}, "data": {"demonstrations": {"train": "a"}}}, ("scope", "lora")),
        (
            {"scope": {"lora": {"bias": "all"}}, "sft": {"unfreeze": {"final_norm": True}}},
            ("scope", "lora", "bias"),
        ),
        ({"scope": {"lora": {"init_lora_weights": "eva"}}}, ("init_lora_weights",)),
        ({"scope": {"lora": {"init_lora_weights": "loftq"}}}, ("init_lora_weights",)),
        ({"scope": {"lora": {"init_lora_weights": "orthogonal", "r": 3}}}, ("r",)),
        ({"scope": {"lora": {"init_lora_weights": "pissa", "use_dora": True}}}, ("use_dora",)),
        (
            {"scope": {"lora": {"init_lora_weights": "olora"}}, "model": {"quantize": "nf4"}},
            ("scope", "lora", "init_lora_weights"),
        ),
    ],
)
def test_conflicts_name_the_key(sections: dict[str, Any], at: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        experiment(**sections)
    (error,) = caught.value.errors()
    assert error["type"] == "conflict"
    assert error["ctx"]["at"] == at


def test_what_those_conflicts_must_let_through() -> None:
    data = {"demonstrations": {"train": "a", "eval": "b"}}
    experiment(data=data, sft={"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no", "save_steps": 3})
    experiment(dpo={"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2]})
    experiment(dpo={"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1})
    experiment(dpo={"loss_type": "exo_pair", "label_smoothing": 0.001})
    experiment(dpo={"loss_type": "discopop", "options": {"discopop_tau": 0.1, "ld_alpha": 0.5}})
    experiment(dpo={"adapter": "frozen"}, scope={"unfreeze": {"lm_head": True}})
    experiment(dpo={"adapter": "new", "unfreeze": {"last_blocks": 2}})
    experiment(scope={"lora": None, "unfreeze": {"last_blocks": 2}}, data={"demonstrations": {"train": "a"}})
    experiment(scope={"lora": {"init_lora_weights": "pissa_niter_16", "bias": "lora_only"}})
    experiment(dpo={"loss_type": "ipo", "options": {"f_divergence_type": "js_divergence", "use_weighting": True}})


def test_what_is_out_of_range_or_unknown_says_what_is_meant() -> None:
    for options in ({"discopop_tau": 0}, {"ld_alpha": 1.5}, {"ld_alpha": -0.1}):
        loss = "discopop" if "discopop_tau" in options else "sigmoid"
        assert errors(dpo={"loss_type": loss, "options": options}) == [("out-of-range", "dpo")]
    with pytest.raises(ValidationError) as caught:
        experiment(scope={"lora": {"init_lora_weights": "pisa"}})
    (error,) = caught.value.errors()
    assert (error["type"], error["ctx"]["mend"]) == ("unknown-value", "did you mean `pissa`?")


def test_what_a_stage_opens_and_where_that_stands() -> None:
    made = experiment(scope={"unfreeze": {"lm_head": True}}, dpo={"unfreeze": {"last_blocks": 1}})
    assert (made.unfreeze_of("sft")[0].lm_head, made.unfreeze_of("sft")[1]) == (True, "/scope/unfreeze")
    assert (made.unfreeze_of("dpo")[0].last_blocks, made.unfreeze_of("dpo")[1]) == (1, "/dpo/unfreeze")


def test_a_check_has_one_pattern_that_compiles() -> None:
    def check(**patterns: str) -> list[tuple[str, str]]:
        return errors(evaluation={"checks": {"c": patterns}})

    assert check() == [("conflict", "evaluation.checks.c")]
    assert check(must_match="a", must_not_match="b") == [("conflict", "evaluation.checks.c")]
    assert check(must_match="(") == [("bad-regex", "evaluation.checks.c.must_match")]
    assert check(must_match="a{99999999999999999999}") == [("bad-regex", "evaluation.checks.c.must_match")]
    assert check(must_match="(" * 5000 + ")" * 5000)[0][0] == "bad-regex"
    with pytest.raises(ValidationError, match="unterminated character set at character 3 of 5"):
        experiment(evaluation={"checks": {"c": {"must_not_match": "ab[cd"}}})
    experiment(evaluation={"checks": {"c": {"must_match": "[[a]"}}})  # a FutureWarning of `re`, and none of ours


@pytest.mark.parametrize(("key", "value"), [("target_modules", []), ("layers", []), ("layers", [-1])])
def test_a_scope_names_something(key: str, value: list[int]) -> None:
    with pytest.raises(ValidationError):
        experiment(scope={"lora": {key: value}})


def test_the_schema_file_is_what_the_definition_gives() -> None:
    written = json.loads((SCHEMAS / "experiment.schema.json").read_text(encoding="utf-8"))
    assert written == experiment_schema(), "run scripts/write_schemas.py"


def test_the_schema_is_draft_07_and_says_what_the_definition_says() -> None:
    schema = experiment_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    text = json.dumps(schema)
    assert "$defs" not in text
    assert '"title": "Experiment"' in text
    assert text.count('"title"') == 1
    assert schema["definitions"]["Dpo"]["properties"]["beta"]["description"].startswith("How far the policy")
    for good in ({"name": "x"}, {"name": "x", "dpo": {"loss_type": ["sigmoid", "sft"], "unfreeze": None}}):
        validator.validate(good)
    for bad in (
        {},
        {"name": "x", "dpo": {"bata": 1}},
        {"name": "x", "dpo": {"loss_type": "sigmod"}},
        {"name": "x", "dpo": {"unfreeze": {"last_block": 1}}},
        {"name": "x", "evaluation": {"checks": {"a b": {}}}},
        {"name": "x", "sft": {"max_length": 0}},
    ):
        assert not validator.is_valid(bad), bad


def test_nothing_stands_beside_a_ref() -> None:
    """Draft-07 ignores it: a description there would be lost."""

    def refs(part: Any) -> list[dict[str, Any]]:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return ([part] if isinstance(part, dict) and "$ref" in part else []) + [r for i in inner for r in refs(i)]

    found = refs(experiment_schema())
    assert found
    assert all(len(ref) == 1 for ref in found)
    assert experiment_schema()["definitions"]["Scope"]["properties"]["unfreeze"]["description"]


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Dpo().beta = 1.0  # type: ignore[misc]
