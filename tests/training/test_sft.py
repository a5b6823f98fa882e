from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import adapter_sha256
from pipeline.runs.run import read_run
from pipeline.training import sft as sft_module
from pipeline.training.sft import run_sft


def experiment(write_experiment: Any, **changes: Any) -> Any:
    return load_experiment(write_experiment(**changes)).experiment


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_folder(write_experiment: Any, tmp_path: Path, console: Any, tiny_folder: Path) -> None:
    outcome = run_sft(experiment(write_experiment), tmp_path / "runs", console)
    assert outcome.run == tmp_path / "runs/lights/sft-001"
    files = {str(file.relative_to(outcome.run)) for file in outcome.run.rglob("*") if file.is_file()}
    assert {
        "experiment.yaml",
        "run.json",
        "metrics.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "state/checkpoint-12/adapter_model.safetensors",
    } <= files
    manifest = read_run(outcome.run).manifest
    assert manifest["status"] == "finished"
    assert manifest["parent"] is None
    assert [entry["rows"] for entry in manifest["data"]] == [12, 4]
    assert manifest["adapter"]["sha256"] == adapter_sha256(outcome.run / "adapter")
    assert manifest["base"]["id"] == str(tiny_folder)
    logged = [line for line in metrics_of(outcome.run) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 13))  # 12 rows, batch 4, 4 epochs
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    assert manifest["metrics"]["loss"] == logged[-1]["loss"]
    assert load_experiment(outcome.run / "experiment.yaml").experiment.name == "lights"


def test_trainable_parameters_are_counted_and_said(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    outcome = run_sft(experiment(write_experiment), tmp_path, console)
    # LoRA of rank 4 on q (32->32), k and v (32->16), o (32->32), gate and up (32->64), down (64->32), four blocks.
    one_block = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 64) + (64 + 32))
    assert outcome.trainable.parameters == 4 * one_block
    assert outcome.trainable.modules["lora layers.*.self_attn.q_proj"] == 4
    assert f"trainable params: {4 * one_block:,}" in console.file.getvalue()


def test_adapter_reopened_by_stock_peft_gives_the_trained_logits(
    write_experiment: Any, tmp_path: Path, console: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    save = sft_module.save_adapter
    monkeypatch.setattr(sft_module, "save_adapter", lambda model, *rest: (trained.append(model), save(model, *rest)))
    outcome = run_sft(experiment(write_experiment), tmp_path, console)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(3, 40)[None]
    before = base(ids).logits
    reopened = PeftModel.from_pretrained(base, outcome.run / "adapter").eval()
    with torch.no_grad():
        expected = trained[0].eval()(input_ids=ids).logits
        assert torch.allclose(reopened(ids).logits, expected, atol=1e-5)  # the trainer sums in another order
    assert (expected - before).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(outcome.run / "adapter").pad_token == "<|im_end|>"


def test_same_seed_gives_the_same_adapter_bit_for_bit(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    one = run_sft(experiment(write_experiment), tmp_path, console)
    again = run_sft(experiment(write_experiment), tmp_path, console)
    other = run_sft(experiment(write_experiment, seed=4), tmp_path, console)
    assert [outcome.run.name for outcome in (one, again, other)] == ["sft-001", "sft-002", "sft-003"]
    hashes = [adapter_sha256(outcome.run / "adapter") for outcome in (one, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_opened_weights_train_at_their_own_rate(
    write_experiment: Any, tmp_path: Path, console: Any, tiny_folder: Path
) -> None:
    opened = {"last_blocks": 1, "final_norm": True, "lm_head": True, "learning_rate": 1.0e-4}
    outcome = run_sft(experiment(write_experiment, sft={"unfreeze": opened, "max_steps": 3}), tmp_path, console)
    logged = [line for line in metrics_of(outcome.run) if "learning_rate" in line]
    for line in logged:
        assert line["learning_rate/opened"] == pytest.approx(line["learning_rate"] / 500)
    assert outcome.trainable.modules["opened layers.*"] == 1
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    start = base.model.layers[3].mlp.up_proj.weight.detach().clone()
    reopened = PeftModel.from_pretrained(base, outcome.run / "adapter")
    moved = (reopened.base_model.model.model.layers[3].mlp.up_proj.weight - start).abs().max()
    assert 0 < moved <= 3 * 1.0e-4 * 1.01  # Adam moves a weight by at most about its rate a step


def test_dry_run_leaves_nothing(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    outcome = run_sft(experiment(write_experiment), tmp_path / "runs", console, dry_run=True)
    assert outcome.run is None
    assert outcome.more["peak_memory_bytes"] > 0
    assert not (tmp_path / "runs").exists()


def test_nan_fails_the_run(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss = sft_module._Trainer.compute_loss
    monkeypatch.setattr(
        sft_module._Trainer, "compute_loss", lambda *given, **more: compute_loss(*given, **more) * float("nan")
    )
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment), tmp_path, console)
    assert caught.value.code == "not-finite"
    assert caught.value.exit_code is ExitCode.WRONG
    run = read_run(tmp_path / "lights/sft-001")
    assert run.status == "failed"
    assert run.manifest["error"]["code"] == "not-finite"
    assert not run.adapter.exists()
    assert [line["loss"] for line in metrics_of(run.path) if "loss" in line] == [None]


def test_signal_saves_a_checkpoint_and_marks_the_run_interrupted(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    step = sft_module._Trainer.training_step

    def interrupted_step(self: Any, *rest: Any, **more: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *rest, **more)

    monkeypatch.setattr(sft_module._Trainer, "training_step", interrupted_step)
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment, sft={"save_strategy": "no"}), tmp_path, console)
    assert caught.value.exit_code is ExitCode.INTERRUPTED
    run = read_run(tmp_path / "lights/sft-001")
    assert run.status == "interrupted"
    assert (run.path / "state/checkpoint-5/optimizer.pt").is_file()


def test_out_of_memory_is_a_message(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *rest: Any, **more: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sft_module._Trainer, "training_step", full)
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment), tmp_path, console)
    assert (caught.value.code, caught.value.exit_code) == ("out-of-memory", ExitCode.MACHINE)
    assert read_run(tmp_path / "lights/sft-001").status == "failed"


def test_the_peak_of_memory_is_the_process_s_own_whoever_started_it() -> None:
    """On Linux `ru_maxrss` of a new program begins with what its parent used."""
    ballast = bytearray(2**30)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = (
        "import torch; from pipeline.model.device import peak_memory, place;"
        "before = peak_memory(place('cpu', 'auto')); more = torch.ones(2**28 // 4);"
        "print(before, peak_memory(place('cpu', 'auto')))"
    )
    before, after = map(
        int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()
    )
    assert after - before > 200 * 2**20
