"""One small model with two adapters, compared as `pipeline compare` does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from pipeline.data.rows import Preference
from pipeline.data.tokens import Pair, tokenize_pair
from pipeline.errors import PipelineError
from pipeline.evaluation.checks import Checks, Rule
from pipeline.evaluation.compare import Asked, Candidate, Policy, compare
from pipeline.evaluation.generation import generate
from pipeline.evaluation.preference import completion_logps, pair_logps, perplexity, preference_scores
from pipeline.evaluation.questions import Question, completion_of
from pipeline.evaluation.results import write_comparison

QUESTIONS = [
    Question([{"role": "user", "content": text}], [{"role": "assistant", "content": '{"f": 1}'}])
    for text in ("Is it on fire?", "Hi", "It works again!")
]
BETA = 0.3


@pytest.fixture
def model(chat_model: Any) -> PeftModel:
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(chat_model, config, adapter_name="sft")
    wrapped.add_adapter("dpo", config)
    return wrapped


@pytest.fixture
def policies(model: PeftModel) -> dict[str, Policy]:
    """Ways to switch the one model; `activations` of each count how often it was."""

    @contextmanager
    def base() -> Iterator[Any]:
        activations["base"] += 1
        with model.disable_adapter():
            yield model

    def adapter(name: str) -> Callable[[], Any]:
        @contextmanager
        def activate() -> Iterator[Any]:
            activations[name] += 1
            model.set_adapter(name)
            yield model

        return activate

    activations = {"base": 0, "sft": 0, "dpo": 0}
    found = {
        "base": Policy("base", base),
        "sft": Policy("sft", adapter("sft")),
        "dpo": Policy("dpo", adapter("dpo")),
    }
    model.activations = activations
    return found


@pytest.fixture
def asked(tiny_tokenizer: Any, conversations: list[Any]) -> Asked:
    return Asked(
        questions=QUESTIONS,
        checks=Checks(match=("f",), rules={"no_e": Rule(re.compile("e"), must_match=False)}),
        completions=[completion_of(tiny_tokenizer, question) for question in QUESTIONS],
        general=[completion_of(tiny_tokenizer, question) for question in QUESTIONS[:2]],
        pairs=[tokenize_pair(tiny_tokenizer, row) for row in conversations] + [Pair([1, 2], [], [])],
        max_new_tokens=12,
        batch_size=2,
        scoring_batch_size=2,
    )


@pytest.fixture
def candidates(policies: dict[str, Policy]) -> list[Candidate]:
    return [
        Candidate("base", policies["base"]),
        Candidate("sft", policies["sft"], reference=policies["base"], beta=BETA),
        Candidate("dpo", policies["dpo"], reference=policies["sft"], beta=BETA),
    ]


def test_what_is_measured_of_whom(candidates: list[Candidate], tiny_tokenizer: Any, asked: Asked) -> None:
    comparison = compare(candidates, tiny_tokenizer, asked, base="base")
    general = {"regression_perplexity"}
    common = {"ends_by_itself", "match/f", "check/no_e", "perplexity", "length_mean", "repetition"} | general
    preferred = common | {"preference_accuracy", "preference_margin", "kl_to_reference", "regression_agreement"}
    assert comparison.models == ["base", "sft", "dpo"]
    assert {name: set(metrics) for name, metrics in comparison.metrics.items()} == {
        "base": common, "sft": preferred, "dpo": preferred
    }  # fmt: skip
    assert {name: set(deltas) for name, deltas in comparison.deltas.items()} == {"sft": common, "dpo": common}
    assert set(comparison.seconds) == {"base", "sft", "dpo"}
    assert comparison.absent == {}
    assert comparison.metrics["dpo"]["preference_margin"].n == 3  # the pair without completions is dropped


def test_figures_are_those_of_each_models_own(
    candidates: list[Candidate], policies: dict[str, Policy], tiny_tokenizer: Any, asked: Asked
) -> None:
    comparison = compare(candidates, tiny_tokenizer, asked, base="base", seed=4)
    logps = {}
    for name, policy in policies.items():
        with policy.activate() as model:
            prompts = [question.prompt for question in QUESTIONS]
            answers = generate(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=1)
            expected = perplexity(
                completion_logps(model, asked.completions).tolist(),
                [len(completion.completion_ids) for completion in asked.completions],
                seed=4,
            )
            logps[name] = pair_logps(model, asked.pairs[:3])
        assert [sample.outputs[name] for sample in comparison.samples] == [answer.text for answer in answers]
        metrics = comparison.metrics[name]
        assert metrics["ends_by_itself"].value == sum(answer.ended for answer in answers) / 3
        assert metrics["length_mean"].value == pytest.approx(sum(answer.tokens for answer in answers) / 3)
        assert metrics["perplexity"].value == pytest.approx(expected.value, rel=1e-4)
    texts = {text for sample in comparison.samples for text in sample.outputs.values()}
    assert len(texts) > 3  # the models do differ

    for name, reference in (("sft", "base"), ("dpo", "sft")):
        scores = preference_scores(
            lambda _, name=name: logps[name], lambda _, name=reference: logps[name], asked.pairs[:3], BETA
        )
        assert comparison.metrics[name]["preference_margin"].value == pytest.approx(float(scores.mean()), abs=1e-4)
        assert comparison.metrics[name]["preference_accuracy"].value == int((scores > 0).sum()) / 3


def test_divergence_and_regression_are_those_of_each_models_own(
    candidates: list[Candidate], policies: dict[str, Policy], tiny_tokenizer: Any, asked: Asked
) -> None:
    comparison = compare(candidates, tiny_tokenizer, asked, base="base")
    logits: dict[str, list[torch.Tensor]] = {}
    for name, policy in policies.items():
        with policy.activate() as model, torch.no_grad():
            logits[name] = [
                model(input_ids=torch.tensor([one.prompt_ids + one.completion_ids])).logits[0, start:-1]
                for one in asked.completions
                if (start := len(one.prompt_ids) - 1)
            ]
    tokens = sum(one.scored_tokens for one in asked.completions)
    for name, reference in (("sft", "base"), ("dpo", "sft")):
        nats = [
            torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=ours), torch.distributions.Categorical(logits=theirs)
            ).sum()
            for ours, theirs in zip(logits[name], logits[reference], strict=True)
        ]
        found = comparison.metrics[name]["kl_to_reference"]
        assert (found.value, found.n) == (pytest.approx(float(sum(nats)) / tokens, rel=1e-3), 3)
        both = zip(logits[name], logits["base"], strict=True)
        same = [(ours.argmax(-1) == theirs.argmax(-1)).sum() for ours, theirs in both]
        agreed = comparison.metrics[name]["regression_agreement"]
        expected = int(sum(same[:2])) / sum(one.scored_tokens for one in asked.general)
        assert (agreed.value, agreed.n) == (pytest.approx(expected), 2)
    # The general questions are the first two of the held-out ones here.
    few = replace(asked, completions=asked.completions[:2])
    alone = compare(candidates[:1], tiny_tokenizer, few).metrics["base"]
    assert alone["regression_perplexity"].value == pytest.approx(alone["perplexity"].value, rel=1e-6)


def test_a_reference_that_is_not_asked_is_scored_all_the_same(
    candidates: list[Candidate], model: PeftModel, tiny_tokenizer: Any, asked: Asked
) -> None:
    every = compare(candidates, tiny_tokenizer, asked).metrics["dpo"]["kl_to_reference"]
    alone = compare(candidates[2:], tiny_tokenizer, asked).metrics["dpo"]["kl_to_reference"]
    assert alone.value == pytest.approx(every.value, rel=1e-5)
    assert "regression_agreement" not in compare(candidates[2:], tiny_tokenizer, asked).metrics["dpo"]


def test_pairs_and_differences_between_versions(
    candidates: list[Candidate], tiny_tokenizer: Any, asked: Asked, conversations: list[Any]
) -> None:
    shown = replace(asked, preferences=[*conversations, Preference("dropped", "a", "b")])
    comparison = compare(candidates, tiny_tokenizer, shown, base="base")
    assert [pair.prompt for pair in comparison.pairs] == [row.prompt for row in conversations]
    for name in ("sft", "dpo"):
        margins = [pair.margins[name] for pair in comparison.pairs]
        assert comparison.metrics[name]["preference_margin"].value == pytest.approx(sum(margins) / 3)
    assert set(comparison.between) == {"sft", "dpo"}
    assert set(comparison.between["dpo"]) == {"sft"}
    assert comparison.between["sft"] == {}
    between = comparison.between["dpo"]["sft"]
    assert between["length_mean"].value == pytest.approx(
        comparison.metrics["dpo"]["length_mean"].value - comparison.metrics["sft"]["length_mean"].value
    )
    assert not [name for name in between if name.startswith("preference_")]  # against two references
    assert comparison.verdict is not None
    assert set(comparison.verdict.scores) == {"base", "sft", "dpo"}


def test_samples_hold_every_prompt(candidates: list[Candidate], tiny_tokenizer: Any, asked: Asked) -> None:
    comparison = compare(candidates, tiny_tokenizer, asked)
    assert [sample.prompt for sample in comparison.samples] == [question.prompt for question in QUESTIONS]
    sample = comparison.samples[0]
    assert sample.reference == '{"f": 1}'
    assert set(sample.outputs) == set(sample.checks) == {"base", "sft", "dpo"}
    for name, text in sample.outputs.items():
        assert sample.checks[name]["check/no_e"] == ("e" not in text)
        assert sample.checks[name]["match/f"] is False
        assert "ends_by_itself" in sample.checks[name]
    assert comparison.deltas == {}


def test_equal_weights_are_scored_once(
    candidates: list[Candidate], model: PeftModel, tiny_tokenizer: Any, asked: Asked
) -> None:
    """The base answers, and is SFT's reference; SFT answers, and scores pairs once for itself and for DPO."""
    compare(candidates, tiny_tokenizer, asked)
    assert model.activations == {"base": 2, "sft": 2, "dpo": 2}


def test_a_reference_need_not_be_compared(policies: dict[str, Policy], tiny_tokenizer: Any, asked: Asked) -> None:
    comparison = compare(
        [Candidate("dpo", policies["dpo"], reference=policies["sft"], beta=BETA)], tiny_tokenizer, asked
    )
    assert comparison.models == ["dpo"]
    assert comparison.metrics["dpo"]["preference_accuracy"].n == 3


def test_a_model_that_diverged(
    candidates: list[Candidate], model: PeftModel, tiny_tokenizer: Any, asked: Asked, tmp_path: Path
) -> None:
    """Its undefined figures are absent, with the reason; the others and the file stay."""
    for name, parameter in model.named_parameters():
        if ".dpo." in name:
            parameter.data.fill_(float("nan"))
    comparison = compare(candidates, tiny_tokenizer, asked, base="base")
    assert set(comparison.absent) == {"dpo"}
    assert set(comparison.absent["dpo"]) == {
        "perplexity", "preference_margin", "preference_accuracy", "kl_to_reference", "regression_perplexity"
    }  # fmt: skip
    assert not set(comparison.absent["dpo"]) & set(comparison.metrics["dpo"])
    assert "perplexity" in comparison.deltas["sft"]
    assert "perplexity" not in comparison.deltas["dpo"]
    write_comparison(tmp_path / "compare.json", comparison)


def test_what_is_not_asked_is_not_measured(candidates: list[Candidate], tiny_tokenizer: Any) -> None:
    comparison = compare(candidates, tiny_tokenizer, Asked(), base="base")
    assert comparison.metrics == {"base": {}, "sft": {}, "dpo": {}}
    assert comparison.samples == []


def test_progress_reaches_every_total(candidates: list[Candidate], tiny_tokenizer: Any, asked: Asked) -> None:
    last: dict[tuple[str, str], tuple[int, int]] = {}

    def progress(model: str, what: str, done: int, total: int) -> None:
        last[model, what] = max(last.get((model, what), (0, total)), (done, total))

    compare(candidates, tiny_tokenizer, asked, progress=progress)
    assert {key: done for key, (done, _) in last.items()} == {key: total for key, (_, total) in last.items()}
    assert {what for _, what in last} == {"answers", "demonstrations", "preferences"}
    assert last["dpo", "answers"] == (3, 3)


def test_answers_begin_from_what_the_demonstrations_computed(
    candidates: list[Candidate], model: PeftModel, tiny_tokenizer: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt is read but in the row of its demonstration; the questions without one are read for their answers."""
    inner = model.get_base_model().model
    stock = inner.forward
    prefilled: list[int] = []

    def forward(input_ids: torch.Tensor, **given: Any) -> Any:
        if given["use_cache"] and "joint" not in given and input_ids.shape[1] > 1:
            prefilled.append(len(input_ids))
        return stock(input_ids=input_ids, **given)

    monkeypatch.setattr(inner, "forward", forward)
    ours = compare(candidates, tiny_tokenizer, asked)
    assert prefilled == []
    plain = compare(candidates, tiny_tokenizer, replace(asked, completions=()))
    assert prefilled == [2, 1] * 3
    assert [sample.outputs for sample in ours.samples] == [sample.outputs for sample in plain.samples]


def test_a_misspelt_field_stops_before_anything_is_asked(
    candidates: list[Candidate], model: PeftModel, tiny_tokenizer: Any
) -> None:
    with pytest.raises(PipelineError, match="`g`"):
        compare(candidates, tiny_tokenizer, Asked(questions=QUESTIONS, checks=Checks(match=("f", "g"))))
    assert model.activations == {"base": 0, "sft": 0, "dpo": 0}


def test_agreement_of_equal_models_is_whole(
    candidates: list[Candidate], policies: dict[str, Policy], tiny_tokenizer: Any, asked: Asked
) -> None:
    twin = Candidate("twin", policies["base"], reference=policies["base"])
    metrics = compare([candidates[0], twin], tiny_tokenizer, asked, base="base").metrics["twin"]
    assert metrics["regression_agreement"].value == 1.0
    assert metrics["kl_to_reference"].value == pytest.approx(0.0, abs=1e-6)
