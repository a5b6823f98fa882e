"""The shipped experiments: each is read, complete, and differs from the others only where it says so."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.experiment import Experiment
from pipeline.experiment_file import dump_experiment, load_experiment
from pipeline.experiment_schema import experiment_schema

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def load(name: str) -> Experiment:
    return load_experiment(ROOT / "recipes" / f"{name}.yaml").experiment


def test_the_recipes_are_these() -> None:
    names = [recipe.stem for recipe in RECIPES]
    assert names == ["all-linear", "baseline", "last-half", "partial", "qkvo", "triage"]


@each_recipe
def test_a_recipe_is_read_and_its_files_are_there(recipe: Path) -> None:
    experiment = load_experiment(recipe).experiment
    assert experiment.name == recipe.stem
    assert experiment.model.id == "builtin:smollm2-135m"
    demonstrations, preferences = experiment.data.demonstrations, experiment.data.preferences
    assert demonstrations is not None
    assert preferences is not None
    for name in (
        demonstrations.train,
        demonstrations.eval,
        preferences.train,
        preferences.eval,
        experiment.evaluation.prompts,
        experiment.evaluation.output_schema,
    ):
        assert name is not None
        assert Path(name).is_file(), name
    assert experiment.evaluation.match == ["severity", "component"]


@each_recipe
def test_a_recipe_conforms_to_the_schema_that_it_names(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=../schemas/experiment.schema.json"
    jsonschema.Draft7Validator(experiment_schema()).validate(yaml.safe_load(text))


@each_recipe
def test_a_recipe_is_the_same_through_the_package(recipe: Path) -> None:
    through = load_experiment(ROOT / "pipeline" / "recipes" / recipe.name).experiment
    assert through == load_experiment(recipe).experiment


@each_recipe
def test_a_recipe_written_out_is_read_back_equal(recipe: Path, tmp_path: Path) -> None:
    experiment = load_experiment(recipe).experiment
    (tmp_path / "resolved.yaml").write_text(dump_experiment(experiment), encoding="utf-8")
    assert load_experiment(tmp_path / "resolved.yaml").experiment == experiment


@each_recipe
def test_the_check_is_the_one_that_the_data_was_made_with(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    promise = importlib.import_module("triage_answers").PROMISE
    check = load_experiment(recipe).experiment.evaluation.checks["no_promise"]
    assert check.must_not_match == promise


def test_only_the_scope_differs() -> None:
    def rest(experiment: Experiment) -> dict[str, Any]:
        kept: dict[str, Any] = experiment.model_dump(exclude={"name", "scope"})
        del kept["dpo"]["unfreeze"]
        return kept

    triage = load("triage")
    assert all(rest(load(recipe.stem)) == rest(triage) for recipe in RECIPES)
    assert load("triage").scope == load("all-linear").scope == load("partial").scope
    assert [load(name).scope.lora.target_modules for name in ("baseline", "qkvo", "all-linear")] == [
        "qv",
        "qkvo",
        "all-linear",
    ]
    assert [load(name).scope.lora.layers for name in ("all-linear", "last-half")] == ["all", "last-half"]


def test_partial_opens_weights_in_the_second_stage_alone() -> None:
    partial = load("partial")
    assert not partial.scope.unfreeze.opens
    assert partial.sft.unfreeze is None
    opened = partial.dpo.unfreeze
    assert opened is not None
    assert opened.model_dump() == {
        "last_blocks": 4,
        "final_norm": True,
        "lm_head": True,
        "learning_rate": 5.0e-6,
    }
    assert all(load(recipe.stem).dpo.unfreeze is None for recipe in RECIPES if recipe.stem != "partial")
