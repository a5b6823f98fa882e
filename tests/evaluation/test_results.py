from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import (
    Comparison,
    PairScore,
    Sample,
    read_comparison,
    samples_worth_showing,
    write_comparison,
)


def comparison(value: float = 0.5) -> Comparison:
    return Comparison(
        models=["base", "sft"],
        base="base",
        metrics={
            "base": {"length_mean": Estimate(2.0, 1.0, 3.0, 4)},
            "sft": {"perplexity": Estimate(value, 0, 1, 4)},
        },
        deltas={"sft": {}},
        samples=[Sample("Grüße", None, {"base": "x", "sft": "y"}, {"base": {}, "sft": {"check/a": True}})],
        seconds={"base": 1.23456, "sft": 2.0},
        pairs=[PairScore("p", "c", "r", {"sft": 0.5, "dpo": None})],
        versions={"sft": {"run": "a/sft-001", "sha256": "1f"}},
    )


def test_the_file_holds_the_contract(tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    file.write_text("old")
    write_comparison(file, comparison())
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "models": ["base", "sft"],
        "base": "base",
        "metrics": {
            "base": {"length_mean": {"value": 2.0, "low": 1.0, "high": 3.0, "n": 4}},
            "sft": {"perplexity": {"value": 0.5, "low": 0, "high": 1, "n": 4}},
        },
        "deltas": {"sft": {}},
        "between": {},
        "versions": {"sft": {"run": "a/sft-001", "sha256": "1f"}},
        "settings": {},
        "judge": {},
        "lm_eval": {},
        "verdict": None,
        "pairs": [{"prompt": "p", "chosen": "c", "rejected": "r", "margins": {"sft": 0.5, "dpo": None}}],
        "absent": {},
        "seconds": {"base": 1.235, "sft": 2.0},
        "samples": [
            {
                "prompt": "Grüße",
                "reference": None,
                "outputs": {"base": "x", "sft": "y"},
                "checks": {"base": {}, "sft": {"check/a": True}},
            }
        ],
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["compare.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_such_number(tmp_path: Path, value: float) -> None:
    file = tmp_path / "compare.json"
    file.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_comparison(file, comparison(value))
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_read_again(tmp_path: Path) -> None:
    assert read_comparison(tmp_path) is None
    write_comparison(tmp_path / "compare.json", comparison())
    assert read_comparison(tmp_path) == comparison().as_dict() | {
        "seconds": {"base": 1.235, "sft": 2.0},
    }
    for damaged in ('{"models": []}', "[1]", '{"models'):
        (tmp_path / "compare.json").write_text(damaged)
        with pytest.raises(PipelineError, match=r"compare\.json"):
            read_comparison(tmp_path)


def test_samples_on_which_the_models_differ_come_first() -> None:
    def sample(name: str, base: dict[str, bool], sft: dict[str, bool]) -> Sample:
        return Sample(name, None, {}, {"base": base, "sft": sft})

    samples = [
        sample("same", {"a": True, "b": False}, {"a": True, "b": False}),
        sample("one", {"a": True, "b": False}, {"a": True, "b": True}),
        sample("also the same", {"a": False}, {"a": False}),
        sample("two", {"a": True, "b": False}, {"a": False, "b": True}),
    ]
    assert [shown.prompt for shown in samples_worth_showing(samples, 2)] == ["one", "two"]
    assert [shown.prompt for shown in samples_worth_showing(samples, 3)] == ["same", "one", "two"]
    assert len(samples_worth_showing(samples, 9)) == 4
