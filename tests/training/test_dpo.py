from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import adapter_sha256
from pipeline.runs.run import read_run
from pipeline.training import dpo as dpo_module
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft

OPENED = {"last_blocks": 1, "final_norm": True, "lm_head": True, "learning_rate": 1.0e-3}


def experiment(write_experiment: Any, **changes: Any) -> Any:
    return load_experiment(write_experiment(**changes)).experiment


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def sft_root(write_experiment: Any, tmp_path: Path, console: Any) -> Path:
    """A root that holds one finished SFT run, `lights/sft-001`."""
    root = tmp_path / "runs"
    run_sft(experiment(write_experiment, sft={"max_steps": 6}), root, console)
    return root


@pytest.mark.parametrize("unfreeze", [{}, OPENED], ids=["lora", "partial"])
def test_step_zero_margins_and_drift(
    write_experiment: Any, sft_root: Path, console: Any, unfreeze: dict[str, Any]
) -> None:
    outcome = run_dpo(experiment(write_experiment, dpo={"unfreeze": unfreeze}), sft_root, console)
    run = read_run(outcome.run)
    reference = run.manifest["reference"]
    assert reference["drift"] == 0.0
    assert reference["start_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert outcome.as_dict()["reference"] == reference
    assert reference["evaluation"]["pairs"] == 4
    assert reference["evaluation"]["apart"] < 1e-4
    assert run.manifest["parent"] == "lights/sft-001"
    logged = [line for line in metrics_of(run.path) if "rewards/margins" in line]
    assert logged[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert logged[-1]["rewards/margins"] > 0.01
    assert any("eval_rewards/accuracies" in line for line in metrics_of(run.path))
    assert not (run.path / "adapter/ref").exists()


@pytest.mark.parametrize("unfreeze", [{}, OPENED], ids=["lora", "partial"])
def test_adapter_reopened_by_stock_peft_gives_the_trained_logits(
    write_experiment: Any,
    sft_root: Path,
    console: Any,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    unfreeze: dict[str, Any],
) -> None:
    trained = []
    save = dpo_module.save_adapter
    monkeypatch.setattr(dpo_module, "save_adapter", lambda model, *rest: (trained.append(model), save(model, *rest)))
    outcome = run_dpo(experiment(write_experiment, dpo={"unfreeze": unfreeze}), sft_root, console)
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    reopened = PeftModel.from_pretrained(base, outcome.run / "adapter").eval()
    sft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), sft_root / "lights/sft-001/adapter"
    ).eval()
    with torch.no_grad():
        expected = trained[0].eval()(input_ids=ids).logits
        assert torch.allclose(reopened(ids).logits, expected, atol=1e-5)  # the trainer sums in another order
        assert (sft(ids).logits - expected).abs().max() > 1e-3


def test_partial_opens_exactly_what_was_asked(write_experiment: Any, sft_root: Path, console: Any) -> None:
    outcome = run_dpo(experiment(write_experiment, dpo={"unfreeze": OPENED, "max_steps": 2}), sft_root, console)
    modules = outcome.trainable.modules
    assert {name: count for name, count in modules.items() if name.startswith("opened")} == {
        "opened layers.*": 1,
        "opened norm": 1,
        "opened lm_head": 1,
    }
    assert {count for name, count in modules.items() if name.startswith("lora")} == {3}
    config = json.loads((outcome.run / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.3", "model.norm", "lm_head"]
    assert config["layers_to_transform"] == [0, 1, 2]


def test_naive_unfreezing_is_caught(
    write_experiment: Any, sft_root: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual recipe: the base's last block, which policy and reference share, set to train."""
    open_policy = dpo_module.open_policy

    def naive(*given: Any, **named: Any) -> Any:
        policy = open_policy(*given, **named)
        for name, parameter in policy.named_parameters():
            if "layers.3." in name and "lora_" not in name:
                parameter.requires_grad_(True)
        return policy

    monkeypatch.setattr(dpo_module, "open_policy", naive)
    with pytest.raises(PipelineError) as caught:
        run_dpo(experiment(write_experiment), sft_root, console)
    assert caught.value.code == "reference-moved"
    assert caught.value.exit_code is ExitCode.WRONG
    run = read_run(sft_root / "lights/dpo-001")
    assert (run.status, run.manifest["error"]["code"]) == ("failed", "reference-moved")
    assert not run.adapter.exists()


def test_wrong_start_is_caught(
    write_experiment: Any, sft_root: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that is not the SFT adapter: step 0 alone would still read ln 2, since its copy is the reference."""
    open_policy = dpo_module.open_policy

    def other(*given: Any, **named: Any) -> Any:
        policy = open_policy(*given, **named)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        return policy

    monkeypatch.setattr(dpo_module, "open_policy", other)
    with pytest.raises(PipelineError, match="not the SFT adapter") as caught:
        run_dpo(experiment(write_experiment), sft_root, console)
    assert caught.value.code == "wrong-start"
    assert not (sft_root / "lights/dpo-001/adapter").exists()


def test_same_seed_gives_the_same_adapter_bit_for_bit(write_experiment: Any, sft_root: Path, console: Any) -> None:
    changes = {"dpo": {"unfreeze": OPENED, "max_steps": 3}}
    runs = [run_dpo(experiment(write_experiment, **changes), sft_root, console).run for _ in range(2)]
    assert adapter_sha256(runs[0] / "adapter") == adapter_sha256(runs[1] / "adapter")


def test_without_a_finished_sft_run(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    with pytest.raises(PipelineError) as caught:
        run_dpo(experiment(write_experiment), tmp_path / "none", console)
    assert (caught.value.code, caught.value.exit_code) == ("no-finished-run", ExitCode.USAGE)
    assert not (tmp_path / "none").exists()


def test_from_a_foreign_adapter(
    write_experiment: Any, tmp_path: Path, console: Any, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    foreign = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    foreign.save_pretrained(tmp_path / "foreign")
    outcome = run_dpo(
        experiment(write_experiment, dpo={"max_steps": 2}), tmp_path, console, start=str(tmp_path / "foreign")
    )
    assert outcome.more["reference"]["drift"] == 0.0
    assert read_run(outcome.run).manifest["parent"] == str(tmp_path / "foreign")


def test_a_changed_sft_adapter_is_refused(write_experiment: Any, sft_root: Path, console: Any) -> None:
    weights = sft_root / "lights/sft-001/adapter/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(PipelineError) as caught:
        run_dpo(experiment(write_experiment), sft_root, console)
    assert caught.value.code == "adapter-changed"


def test_an_adapter_that_changes_while_dpo_trains_fails_the_run(
    write_experiment: Any, sft_root: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_root / "lights/sft-001/adapter/adapter_config.json"
    train = dpo_module.train

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        metrics = train(*args, **kwargs)
        config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
        return metrics

    monkeypatch.setattr(dpo_module, "train", meanwhile)
    with pytest.raises(PipelineError) as caught:
        run_dpo(experiment(write_experiment, dpo={"max_steps": 2}), sft_root, console)
    assert caught.value.code == "adapter-changed"
    assert read_run(sft_root / "lights/dpo-001").status == "failed"


def test_another_base_is_refused(
    write_experiment: Any, sft_root: Path, console: Any, tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.model.norm.weight[0] += 0.5
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(PipelineError, match="base weights differ") as caught:
        run_dpo(experiment(write_experiment, model={"id": str(tmp_path / "other")}), sft_root, console)
    assert caught.value.code == "other-base"


def test_pairs_are_cut_and_left_out_as_trl_does(tiny_tokenizer: Any) -> None:
    from pipeline.data.rows import Preference
    from pipeline.training.dpo import tokenize_preferences

    rows = [
        Preference([{"role": "user", "content": "hi"}], *([{"role": "assistant", "content": c}] for c in ("a", "b"))),
        Preference(
            [{"role": "user", "content": "hi"}], *([{"role": "assistant", "content": c * 90}] for c in ("a", "b"))
        ),
        Preference(
            [{"role": "user", "content": "x" * 90}], *([{"role": "assistant", "content": c}] for c in ("a", "b"))
        ),
    ]
    pairs, counted = tokenize_preferences(tiny_tokenizer, rows, 64)
    assert (counted.rows, counted.used, counted.truncated, counted.dropped) == (3, 2, 2, 1)
    assert counted.dropped_rows == [3]
    assert len(pairs[1].prompt_ids) + len(pairs[1].chosen_ids) == 64
