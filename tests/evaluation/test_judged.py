"""The judge inside a comparison: who is judged against whom, and that a judge that fails costs only the judgement."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.evaluation import runs
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.judge import Judged
from pipeline.evaluation.results import Comparison, Sample
from pipeline.evaluation.table import print_comparison
from pipeline.experiment import Judge

SETTINGS = Judge(base_url="http://localhost:1/v1", model="m")
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Red?"}]


def comparison() -> Comparison:
    models = ["base", "sft", "dpo"]
    outputs = {name: f"{name} says so" for name in models}
    sample = Sample(TURNS, None, outputs, {name: {} for name in models})
    return Comparison(models, "base", {name: {} for name in models}, {}, [sample], dict.fromkeys(models, 1.0))


def test_each_version_is_judged_against_the_one_before(monkeypatch: pytest.MonkeyPatch, console: Any) -> None:
    asked = []

    def judge_pairs(settings: Judge, questions: list[str], ours: list[str], theirs: list[str], **_: Any) -> Judged:
        asked.append((questions, ours, theirs))
        return Judged(1, 0, 0, 2, Estimate(1.0, 0.5, 1.0, 1), None)

    monkeypatch.setattr(runs, "judge_pairs", judge_pairs)
    judged = runs._judged(SETTINGS, comparison(), 0, console)
    assert asked == [
        (["system: Be brief.\n\nuser: Red?"], ["sft says so"], ["base says so"]),
        (["system: Be brief.\n\nuser: Red?"], ["dpo says so"], ["sft says so"]),
    ]
    assert {name: list(others) for name, others in judged.judge.items()} == {"sft": ["base"], "dpo": ["sft"]}
    assert judged.as_dict()["judge"]["dpo"]["sft"]["win_rate"] == {"value": 1.0, "low": 0.5, "high": 1.0, "n": 1}
    print_comparison(judged, console)
    assert "judge: dpo against sft: 1 won, 0 even, 0 lost, 100 % [50, 100], 2 not judged" in console.file.getvalue()


def test_a_judge_that_fails_costs_only_the_judgement(monkeypatch: pytest.MonkeyPatch, console: Any) -> None:
    def judge_pairs(*_: Any, **__: Any) -> Judged:
        raise PipelineError("the judge cannot be used: HTTP 401", code="judge-failed", mend="check the key")

    monkeypatch.setattr(runs, "judge_pairs", judge_pairs)
    judged = runs._judged(SETTINGS, comparison(), 0, console)
    assert judged.judge == {}
    assert judged.absent["sft"] == {"judge": "the judge cannot be used: HTTP 401"}
    print_comparison(judged, console)
    assert "dpo: no judgement: the judge cannot be used: HTTP 401" in console.file.getvalue()
