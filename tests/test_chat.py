"""Base and adapter answer side by side, each in its own conversation."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.chat import chat
from pipeline.errors import PipelineError
from pipeline.evaluation.generation import generate
from pipeline.runs.run import Run
from tests.records import definition, write_run


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Run:
    torch.manual_seed(4)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model = {"id": str(tiny_folder), "device": "cpu"}
    run = write_run(
        tmp_path / "e" / "sft-001", "sft", [], definition=definition(model=model, evaluation={"max_new_tokens": 6})
    )
    policy.save_pretrained(run.adapter)
    return run


@pytest.fixture
def answers_of(tiny_folder: Path, run: Run) -> Callable[[str, list[dict[str, str]]], str]:
    """What stock Transformers and PEFT load, asked a whole conversation."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    models = {
        "base": base,
        "sft": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run.adapter),
    }

    def answer(name: str, turns: list[dict[str, str]]) -> str:
        return generate(models[name], tokenizer, [turns], max_new_tokens=6, batch_size=1)[0].text

    return answer


def test_each_sees_its_own_conversation(
    run: Run, answers_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, console: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it red?\n\nAnd now?\n"))
    turns = chat(run, console, system="Be brief.")
    assert [turn["user"] for turn in turns] == ["Is it red?", "And now?"]
    for name in ("base", "sft"):
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it red?"}]
        assert turns[0][name] == answers_of(name, said)
        said += [{"role": "assistant", "content": turns[0][name]}, {"role": "user", "content": "And now?"}]
        assert turns[1][name] == answers_of(name, said)
    assert turns[0]["base"] != turns[0]["sft"]
    printed = console.file.getvalue()
    assert printed.count("base> ") == printed.count("sft> ") == 2


def test_answers_are_computed_with_the_sum_of_weights(
    run: Run, summed: list[Any], monkeypatch: pytest.MonkeyPatch, console: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it red?\n"))
    chat(run, console)
    assert summed


def test_an_adapter_folder_names_no_base(run: Run, console: Any) -> None:
    with pytest.raises(PipelineError, match="adapter folder"):
        chat(run.adapter, console)
