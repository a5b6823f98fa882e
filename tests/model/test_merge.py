from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model import merge as merge_module
from pipeline.model.merge import merge_named
from pipeline.runs.run import create_run

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """A random adapter that also holds the last block and the head, which is tied in the base."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["model.layers.3", "lm_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def refusal(*given: Any) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        merge_named(*given)
    return caught.value


def test_the_merged_model_needs_no_peft_and_keeps_its_own_head(
    adapter: Path, tiny_folder: Path, tmp_path: Path, console: Any
) -> None:
    out = tmp_path / "out" / "merged"
    merged = merge_named(tmp_path, str(adapter), out, None, console.print)
    assert merged.as_dict() | {"difference": 0} == {
        "path": str(out),
        "dtype": "float32",
        "difference": 0,
        "tolerance": 0.01,
        "tied_head": False,
        "parameters": AutoModelForCausalLM.from_pretrained(tiny_folder).num_parameters()
        + len(AutoTokenizer.from_pretrained(tiny_folder)) * 32,  # the head is a matrix of its own now
    }
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        expected = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        assert (loaded(input_ids=ids).logits - expected).abs().max() < 1e-3
    assert loaded.config.tie_word_embeddings is False
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_folder, out))
    assert (after.get_vocab(), after.chat_template) == (before.get_vocab(), before.chat_template)
    assert GenerationConfig.from_pretrained(out).eos_token_id == before.eos_token_id
    assert [file.name for file in out.parent.iterdir()] == ["merged"]


def test_half_precision_is_said_and_allowed_more(adapter: Path, tmp_path: Path, console: Any) -> None:
    merged = merge_named(tmp_path, str(adapter), tmp_path / "merged", "bfloat16", console.print)
    assert (merged.dtype, merged.allowed) == ("bfloat16", 0.1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_a_folder_that_holds_something_is_left_alone(adapter: Path, tmp_path: Path, console: Any) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    merge_named(tmp_path, str(adapter), out, None, console.print)  # an empty one will do
    before = sorted(file.name for file in out.iterdir())
    error = refusal(tmp_path, str(adapter), out, None, console.print)
    assert (error.code, error.exit_code) == ("out-exists", ExitCode.USAGE)
    assert sorted(file.name for file in out.iterdir()) == before


def test_a_model_that_computes_something_else_is_not_kept(
    adapter: Path, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = merge_module.load_base

    def spoiled(files: Any, *rest: Any) -> Any:
        model = load(files, *rest)
        if files.folder.name.startswith(".merged"):  # what was written
            with torch.no_grad():
                model.lm_head.weight.mul_(1.1)
        return model

    monkeypatch.setattr(merge_module, "load_base", spoiled)
    error = refusal(tmp_path, str(adapter), tmp_path / "merged", None, console.print)
    assert (error.code, error.exit_code) == ("merged-differs", ExitCode.WRONG)
    assert not [file for file in tmp_path.iterdir() if "merged" in file.name]


def test_what_cannot_be_merged_is_said(
    adapter: Path, write_experiment: Callable[..., Path], tmp_path: Path, console: Any
) -> None:
    from pipeline.experiment_file import dump_experiment

    experiment = load_experiment(write_experiment()).experiment
    run = create_run(tmp_path / "runs", "lights", "sft", dump_experiment(experiment), {})
    run.end("failed")
    assert refusal(tmp_path / "runs", "lights/sft-001", tmp_path / "m", None, print).code == "no-finished-run"
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    assert refusal(tmp_path, str(adapter), tmp_path / "m", None, print).code == "no-base"
