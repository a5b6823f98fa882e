from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.data.rows import Demonstration, Preference
from pipeline.errors import PipelineError
from pipeline.evaluation.generation import Answer
from pipeline.evaluation.questions import Question
from pipeline.experiment_file import load_experiment
from pipeline.training.watch import samples as samples_module
from pipeline.training.watch.samples import Sampler, sample_questions

TRAINER = SimpleNamespace(
    accelerator=SimpleNamespace(autocast=nullcontext, unwrap_model=lambda model: model),
    model=torch.nn.Linear(1, 1),
    processing_class=None,
)
QUESTIONS = [Question([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "On?"}], [])]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_questions_are_the_first_of_the_prompts(write_experiment: Any) -> None:
    experiment = load_experiment(write_experiment(tracking={"samples": 3})).experiment
    asked = sample_questions(experiment, [Demonstration(prompt="other", completion="row")])
    assert [question.prompt[-1]["content"] for question in asked] == [
        f"Which light is on? I see {colour}." for colour in ("mint", "rust", "sand")
    ]


def test_without_prompts_they_are_the_held_out_rows_of_the_stage(write_experiment: Any) -> None:
    """A row that asks nothing is passed over."""
    experiment = load_experiment(write_experiment(tracking={"samples": 2}, evaluation={"prompts": None})).experiment
    rows = [
        Demonstration([turn("assistant", "Hello.")]),
        Preference("Is it on?", " yes", " no"),
        Demonstration([turn("user", "Off?"), turn("assistant", "No.")]),
        Demonstration(prompt="third", completion="row"),
    ]
    prompts = [question.prompt for question in sample_questions(experiment, rows)]
    assert prompts == ["Is it on?", [turn("user", "Off?")]]


def test_none_are_asked_where_none_are_wanted(write_experiment: Any) -> None:
    experiment = load_experiment(write_experiment(tracking={"samples": 0})).experiment
    assert sample_questions(experiment, [Preference("?", "a", "b")]) == []


def test_the_answer_stands_beside_what_was_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "generate", lambda *args, **kwargs: [Answer("It is.", 3, True)])
    (sample,) = Sampler(TRAINER, QUESTIONS, 8, print).ask()
    assert (sample.prompt, sample.answer, sample.tokens, sample.ended) == ("On?", "It is.", 3, True)


def test_answers_are_computed_with_the_sum_of_weights(
    tiny_folder: Path, summed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=2)).eval()

    @torch.no_grad()
    def generate(model: Any, *args: Any, **kwargs: Any) -> list[Answer]:
        model(input_ids=torch.tensor([[5, 6]]))
        return [Answer("It is.", 3, True)]

    monkeypatch.setattr(samples_module, "generate", generate)
    Sampler(SimpleNamespace(**{**vars(TRAINER), "model": model}), QUESTIONS, 8, print).ask()
    assert len(summed) == len([name for name, _ in model.named_modules() if name.endswith("lora_A")])


@pytest.mark.parametrize(
    ("own", "while_asked"),
    [("sdpa", "short_rows"), ("shared_prompt", "short_rows"), ("eager", "eager")],
)
def test_answers_are_short_rows(tiny_folder: Path, own: str, while_asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=2)).eval()
    model.config._attn_implementation = own
    seen: list[str] = []

    def generate(model: Any, *args: Any, **kwargs: Any) -> list[Answer]:
        seen.append(model.config._attn_implementation)
        return [Answer("It is.", 3, True)]

    monkeypatch.setattr(samples_module, "generate", generate)
    Sampler(SimpleNamespace(**{**vars(TRAINER), "model": model}), QUESTIONS, 8, print).ask()
    assert seen == [while_asked]
    assert model.config._attn_implementation == own


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PipelineError("prompt 1 is too long", code="prompt-too-long", mend="shorten it"), "prompt 1 is too long"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory does not hold them"),
    ],
)
def test_answers_that_fail_end_the_looking_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    def broken(*args: Any, **kwargs: Any) -> list[Answer]:
        raise error

    monkeypatch.setattr(samples_module, "generate", broken)
    said: list[str] = []
    sampler = Sampler(TRAINER, QUESTIONS, 8, said.append)
    assert sampler.ask() == []
    assert sampler.ask() == []
    assert said == [f"no more sampled answers: {why}; `tracking.samples: 0` asks for none"]
