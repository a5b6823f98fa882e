"""lm-eval's tasks. Where lm-eval is not installed, as in CI, a stand-in with its signatures takes its place; the tests
that need the real one say so."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from pipeline.errors import PipelineError
from pipeline.evaluation import harness
from pipeline.evaluation.harness import TaskFigure, figures_of, require_tasks, run_tasks, task_rows
from pipeline.evaluation.runs import compare_runs
from pipeline.evaluation.table import print_comparison
from pipeline.experiment import LmEval
from pipeline.experiment_file import load_experiment
from pipeline.report.page import render
from pipeline.runs.run import read_run
from pipeline.training.sft import run_sft

INSTALLED = importlib.util.find_spec("lm_eval") is not None
RESULTS: dict[str, Any] = {
    "results": {
        "lights": {
            "alias": "lights",
            "name": "lights",
            "sample_len": 6,
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "exact_match,strict": 1.0,
            "exact_match_stderr,strict": "N/A",
        },
        "all": {
            "alias": "all",
            "sample_len": 8,
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "sample_count": {"acc,none": 4},
        },
    }
}
"""As lm-eval 0.4.13 gives them; a group's metrics count their own rows."""


class Manager:
    """`lm_eval.tasks.TaskManager`, as far as it is used."""

    def __init__(self, include_path: str | None = None) -> None:
        self.all_tasks = ["hellaswag", "lights", "mmlu_a", "mmlu_b"]

    def match_tasks(self, task_list: list[str]) -> list[str]:
        from fnmatch import filter as matching

        return sorted({task for pattern in task_list for task in matching(self.all_tasks, pattern)})


class Model:
    """`HFLM`: it ties the head anew, and its second argument is the tokenizer."""

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_size: int | str | None = 1) -> None:
        pretrained.tie_weights()
        self.model, self.tokenizer = pretrained, tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Stands in for the package; what `simple_evaluate` was asked."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(
        model: Any,
        model_args: Any = None,
        tasks: list[str] | None = None,
        num_fewshot: int | None = None,
        *,
        limit: float | None = None,
        log_samples: bool = True,
        apply_chat_template: bool | str = False,
        task_manager: Any = None,
        confirm_run_unsafe_code: bool = False,
    ) -> dict[str, Any]:
        print("lm-eval talks on stdout")
        with torch.no_grad():
            score = float(model.model(torch.tensor([[1, 2, 3]])).logits.sum())
        calls.append({"tasks": tasks, "limit": limit, "unsafe": confirm_run_unsafe_code, "score": score})
        return RESULTS

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval.tasks"] = ModuleType("lm_eval.tasks")
    modules["lm_eval"].__version__ = "0.4.13"  # type: ignore[attr-defined]
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.models.huggingface"].HFLM = Model  # type: ignore[attr-defined]
    modules["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    stock = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "lm_eval" or stock(name, *rest))
    harness._manager.cache_clear()
    yield calls
    harness._manager.cache_clear()


def test_figures_are_passed_through_with_their_errors() -> None:
    assert figures_of(RESULTS) == {
        "lights/acc": TaskFigure(0.5, 0.25, 6),
        "lights/exact_match,strict": TaskFigure(1.0, None, 6),
        "all/acc": TaskFigure(0.25, 0.125, 4),
    }
    assert [str(TaskFigure(0.5, 0.25, 6)), str(TaskFigure(12.25, None, 6))] == ["0.5000 ± 0.25", "12.25"]


def test_rows_of_figures_that_one_model_has_not() -> None:
    compared = {"models": ["base", "sft"], "lm_eval": {"base": {"t/acc": {"value": 1.0, "stderr": None, "n": 3}}}}
    assert task_rows(compared) == [("t/acc", "3", ["1.000", None])]
    assert task_rows({"models": ["base"]}) == []  # of a comparison that is older than this


def test_without_the_package_it_says_what_to_install(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded or a run is looked at; and with `--no-lm-eval` nothing is asked for."""
    stock = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else stock(name, *rest)
    )
    experiment = load_experiment(write_experiment(evaluation={"lm_eval": {"tasks": ["lights"]}})).experiment
    with pytest.raises(PipelineError) as caught:
        compare_runs([tmp_path / "none"], experiment, tmp_path, console)
    assert (caught.value.code, caught.value.pointer) == ("missing-package", "/evaluation/lm_eval")
    assert 'pip install "preference-pipeline[lm-eval]"' in caught.value.mend
    with pytest.raises(PipelineError) as caught:
        compare_runs([tmp_path / "none"], experiment, tmp_path, console, with_lm_eval=False)
    assert caught.value.code != "missing-package"


def test_a_task_that_is_not_known_is_said_at_once(asked: list[dict[str, Any]]) -> None:
    require_tasks(LmEval(tasks=["lights", "mmlu_*"]))
    with pytest.raises(PipelineError, match=r"knows no task `light`, `mmlu-\*` ") as caught:
        require_tasks(LmEval(tasks=["light", "lights", "mmlu-*"]))
    assert caught.value.code == "unknown-task"


def test_tasks_run_with_the_adapter_and_leave_the_model_as_it_was(
    asked: list[dict[str, Any]], chat_model: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a PEFT model with an opened head: tying it anew would fail, or undo it."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(chat_model, LoraConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        adapted.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
        expected = float(adapted(torch.tensor([[1, 2, 3]])).logits.sum())
    figures = run_tasks(LmEval(tasks=["mmlu_*", "lights"], limit=4), adapted, tiny_tokenizer)
    assert figures == figures_of(RESULTS)
    assert asked == [{"tasks": ["lights", "mmlu_a", "mmlu_b"], "limit": 4, "unsafe": False, "score": expected}]
    assert "tie_weights" not in vars(adapted.get_base_model())
    assert capsys.readouterr().out == ""  # stdout is one JSON object's


def test_figures_reach_the_file_the_table_and_the_report(
    asked: list[dict[str, Any]], write_experiment: Any, tmp_path: Path, console: Any
) -> None:
    settings = {"tasks": ["lights"], "limit": 6, "include_path": "tasks"}
    experiment = load_experiment(write_experiment(sft={"max_steps": 3}, evaluation={"lm_eval": settings})).experiment
    assert experiment.evaluation.lm_eval is not None
    assert experiment.evaluation.lm_eval.include_path == str(tmp_path / "tasks")
    outcome = run_sft(experiment, tmp_path / "runs", console)
    assert outcome.run is not None
    run = read_run(outcome.run)
    comparison = compare_runs([run], experiment, tmp_path / "runs", console)
    assert len(asked) == 2
    assert asked[0]["score"] != asked[1]["score"]  # the base's weights, then the run's
    written = json.loads((run.path / "compare.json").read_text())
    assert written["lm_eval"]["sft"]["lights/acc"] == {"value": 0.5, "stderr": 0.25, "n": 6}
    assert written["settings"]["lm_eval"] == {
        **experiment.evaluation.lm_eval.model_dump(), "version": "0.4.13"
    }  # fmt: skip
    print_comparison(comparison, console, samples=0)
    for shown in (console.file.getvalue(), render([run], tmp_path / "runs")):
        assert shown.count("0.5000 ± 0.25") == 2
        assert "lights/exact_match,strict" in shown


def test_what_fails_in_lm_eval_costs_only_its_figures(
    asked: list[dict[str, Any]], write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*given: Any, **named: Any) -> Any:
        raise ConnectionError("no network\nfor the data")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", offline)
    experiment = load_experiment(
        write_experiment(sft={"max_steps": 1}, evaluation={"lm_eval": {"tasks": ["lights"]}})
    ).experiment
    outcome = run_sft(experiment, tmp_path / "runs", console)
    assert outcome.run is not None
    comparison = compare_runs([read_run(outcome.run)], experiment, tmp_path / "runs", console)
    assert comparison.metrics["sft"]["perplexity"].n == 4
    assert comparison.lm_eval == {}
    cause = "lm-eval failed: ConnectionError: no network for the data"
    assert {name: some["lm_eval"] for name, some in comparison.absent.items()} == {"base": cause, "sft": cause}
    print_comparison(comparison, console)
    assert f"sft: no figures of lm-eval: {cause}" in console.file.getvalue()


needs_lm_eval = pytest.mark.skipif(
    not INSTALLED, reason='lm-eval is not installed: pip install "preference-pipeline[lm-eval]"'
)


@needs_lm_eval
def test_the_stand_in_has_the_real_signatures() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    given = {"tasks", "num_fewshot", "limit", "log_samples", "apply_chat_template", "task_manager"}
    assert given | {"model", "confirm_run_unsafe_code"} <= inspect.signature(simple_evaluate).parameters.keys()
    assert {"pretrained", "tokenizer", "batch_size"} <= inspect.signature(HFLM).parameters.keys()
    assert "include_path" in inspect.signature(TaskManager).parameters


@needs_lm_eval
def test_the_real_lm_eval_on_a_task_of_ones_own(tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The share of questions whose right answer is the likelier one, worked out here by the model itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rows = [
        {"question": f"I see {colour}.", "choices": [f" The {colour} light is on.", " soon"], "answer": at % 2}
        for at, colour in enumerate(["red", "green", "blue", "white", "black", "pink"])
    ]
    (tmp_path / "lights.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own_lights",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lights.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "lights.yaml").write_text(yaml.safe_dump(task))
    settings = LmEval(tasks=["own_lights"], include_path=str(tmp_path), limit=5)
    require_tasks(settings)
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=["lm_head"]),
    ).eval()

    def logp(question: str, choice: str) -> float:
        before, whole = (tiny_tokenizer(text)["input_ids"] for text in (question, question + choice))
        with torch.no_grad():
            logps = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, torch.tensor(whole[1:])[:, None])[len(before) - 1 :].sum())

    right = [
        logp(row["question"], row["choices"][row["answer"]]) > logp(row["question"], row["choices"][1 - row["answer"]])
        for row in rows[:5]
    ]
    share = sum(right) / 5
    figures = run_tasks(settings, model, tiny_tokenizer)
    assert set(figures) == {"own_lights/acc"}
    assert (figures["own_lights/acc"].value, figures["own_lights/acc"].n) == (pytest.approx(share), 5)
    # lm-eval's standard error of a mean: of the sample's deviation, n - 1.
    assert figures["own_lights/acc"].stderr == pytest.approx((share * (1 - share) / 4) ** 0.5)
