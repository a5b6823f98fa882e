"""The code that the report gives is run as it stands: it opens the adapter, and what it opens is the trained model."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.generation import generate
from pipeline.experiment import Experiment
from pipeline.report.loading import loading_code
from pipeline.runs.run import Run
from tests.records import definition, write_run


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Run:
    """A run whose adapter is random, on the tiny model."""
    torch.manual_seed(4)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    base = {"id": str(tiny_folder), "revision": None, "sha256": "0"}
    run = write_run(tmp_path / "it's" / "sft-001", "sft", [], base=base)
    policy.save_pretrained(run.adapter)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(run.adapter)
    return run


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": "Is it 'red'?\n\"yes\" or \\no?"}], "The printer is"])
def test_the_code_runs_as_it_is_pasted(run: Run, prompt: Any, tiny_folder: Path) -> None:
    value = definition()
    value["evaluation"] = {"max_new_tokens": 8}
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(loading_code(run, Experiment.model_validate(value), prompt), names)
    model, tokenizer = names["model"], names["tokenizer"]
    assert any("lora_A" in name for name, _ in model.named_parameters())
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    assert printed.getvalue() == answer.text + "\n"
    with model.disable_adapter():
        (other,) = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    assert other.text != answer.text  # it is the adapter that spoke


def test_what_a_base_needs_is_in_the_code(run: Run) -> None:
    def code(base: dict[str, Any], **model: Any) -> str:
        run.manifest["base"] = {"revision": None, **base}
        text = loading_code(run, Experiment.model_validate(definition(model={"id": base["id"], **model})), "Hi")
        compile(text, "<pasted>", "exec")
        return text

    assert "from_pretrained(builtin_model('builtin:smollm2-135m'))" in code({"id": "builtin:smollm2-135m"})
    assert "revision='4c2f'" in code({"id": "some/model", "revision": "4c2f"})
    assert "from_pretrained('/models', gguf_file='m.gguf')" in code({"id": "/models/m.gguf"})
    assert "load_in_4bit=True" in code({"id": "some/model"}, quantize="nf4")
    assert "dtype='bfloat16'" in code({"id": "some/model"}, dtype="bfloat16")
    assert "trust_remote_code=True" in code({"id": "some/model"}, trust_remote_code=True)
