"""What is saved, what stops a run, and how it is said; that a resumed run ends the same is in tests/faults."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.runs.checkpoints import problem_of
from pipeline.runs.resume import Resume
from pipeline.runs.run import read_run
from pipeline.training import sft as sft_module
from pipeline.training.callbacks import Guard
from pipeline.training.keeper import Keeper
from pipeline.training.sft import run_sft

SHORT = {"num_train_epochs": 2, "per_device_train_batch_size": 4}  # 12 rows: three steps an epoch


def experiment(write_experiment: Any, **changes: Any) -> Any:
    return load_experiment(write_experiment(sft={**SHORT, **changes})).experiment


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Any], None]) -> None:
    """Does something inside the training step that follows `step` finished ones."""
    training_step = sft_module._Trainer.training_step

    def acting(self: Any, *rest: Any, **more: Any) -> Any:
        if self.state.global_step == step:
            act(self)
        return training_step(self, *rest, **more)

    monkeypatch.setattr(sft_module._Trainer, "training_step", acting)


def steps_of(run: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], next(key for key in ("loss", "eval_loss", "train_loss") if key in line)) for line in lines]


def test_a_checkpoint_holds_the_policy_as_stock_peft_has_it(
    write_experiment: Any, tmp_path: Path, console: Any, tiny_folder: Path
) -> None:
    outcome = run_sft(experiment(write_experiment, save_total_limit=1), tmp_path, console)
    folders = sorted((outcome.run / "state").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-6"]  # one more than was asked for
    assert [problem_of(folder) for folder in folders] == [None, None]
    last, adapter = folders[1], outcome.run / "adapter"
    saved, trained = (load_file(folder / "adapter_model.safetensors") for folder in (last, adapter))
    assert all(torch.equal(saved[name], trained[name]) for name in saved | trained)
    assert not list(last.glob("*.bin"))
    for name in ("optimizer.pt", "scheduler.pt", "generators.pt"):
        torch.load(last / name, weights_only=True)


def test_times_are_in_the_manifest_and_not_in_the_record(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    outcome = run_sft(experiment(write_experiment), tmp_path, console)
    record = (outcome.run / "metrics.jsonl").read_text()
    assert "runtime" not in record
    assert "per_second" not in record
    metrics = read_run(outcome.run).manifest["metrics"]
    assert metrics["train_runtime"] > 0
    # 12 rows, twice.
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(24, rel=0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_its_step(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    at_step(monkeypatch, 1, lambda trainer: os.kill(os.getpid(), number))
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment), tmp_path, console)
    assert caught.value.exit_code is ExitCode.INTERRUPTED
    assert "step 2 of 6, with a checkpoint of step 2" in caught.value.message
    assert "--resume" in caught.value.mend
    run = read_run(tmp_path / "lights/sft-001")
    assert run.status == "interrupted"
    assert problem_of(run.path / "state/checkpoint-2") is None
    assert steps_of(run.path)[:3] == [(0, "eval_loss"), (1, "loss"), (2, "loss")]
    assert not any(kind == "eval_loss" for step, kind in steps_of(run.path) if step)


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(trainer: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 4, twice)
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment), tmp_path, console)
    assert "step 4 of 6, with a checkpoint of step 3" in caught.value.message
    run = read_run(tmp_path / "lights/sft-001")
    assert run.status == "interrupted"
    assert [folder.name for folder in (run.path / "state").iterdir()] == ["checkpoint-3"]


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_sft(experiment(write_experiment, per_device_eval_batch_size=1), tmp_path / "whole", console)
    evaluated = 0
    prediction_step = sft_module._Trainer.prediction_step

    def interrupted(self: Any, *rest: Any, **more: Any) -> Any:
        nonlocal evaluated
        evaluated += 1
        if evaluated == 6:  # the second row behind the four of step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return prediction_step(self, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(sft_module._Trainer, "prediction_step", interrupted)
        with pytest.raises(PipelineError) as caught:
            run_sft(experiment(write_experiment, per_device_eval_batch_size=1), tmp_path, console)
    assert "step 3 of 6, with a checkpoint of step 3" in caught.value.message
    assert evaluated == 6
    run = tmp_path / "lights/sft-001"
    assert steps_of(run) == [(0, "eval_loss"), (1, "loss"), (2, "loss"), (3, "loss"), (3, "train_loss")]
    run_sft(experiment(write_experiment, per_device_eval_batch_size=1), tmp_path, console, resume=Resume())
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / file).read_bytes() == (whole.run / file).read_bytes()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_names_the_rows_of_the_batch_and_keeps_the_last_good_state(
    write_experiment: Any,
    tmp_path: Path,
    console: Any,
    monkeypatch: pytest.MonkeyPatch,
    tiny_data: dict[str, Path],
    accumulation: int,
) -> None:
    """The row that poisons is the one that says `plum`, in line 11."""
    compute_loss = sft_module._Trainer.compute_loss
    seen: list[set[int]] = []

    def poisoned(self: Any, model: Any, inputs: dict[str, Any], **more: Any) -> Any:
        texts = [self.processing_class.decode(ids) for ids in inputs["input_ids"]]
        if self.model.training:
            lines = tiny_data["demonstrations"].read_text().splitlines()
            batch = {at for at, line in enumerate(lines, 1) if any(colour(line) in text for text in texts)}
            seen.append(batch)
            loss = compute_loss(self, model, inputs, **more)
            return loss * float("nan") if 11 in batch and len(seen) > 3 * accumulation else loss
        return compute_loss(self, model, inputs, **more)

    def colour(line: str) -> str:
        return str(json.loads(line)["messages"][0]["content"].split()[-1])

    monkeypatch.setattr(sft_module._Trainer, "compute_loss", poisoned)
    changes = {
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment, **changes), tmp_path, console)
    assert caught.value.code == "not-finite"
    assert f"{tiny_data['demonstrations']}:11" in caught.value.message
    poisoned_batch = next(batch for batch in seen[3 * accumulation :] if 11 in batch)
    named = {int(part.split(":")[-1]) for part in caught.value.message.split("trained on ")[1].split(", ")}
    assert named == poisoned_batch
    step = int(caught.value.message.split("at step ")[1].split(",")[0])
    run = read_run(tmp_path / "lights/sft-001")
    assert max((run.path / "state").iterdir()).name == f"checkpoint-{step - 1}"
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-2])["loss"] is None


def test_weights_that_are_not_finite_are_not_saved(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that overflows in the optimizer shows in no loss before the next step."""

    def poison(trainer: Any) -> None:
        parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        step = trainer.optimizer.step

        def poisoned(*given: Any, **more: Any) -> Any:
            step(*given, **more)
            parameter.data.view(-1)[0] = float("inf")

        trainer.optimizer.step = poisoned

    at_step(monkeypatch, 1, poison)  # no evaluation stands between this step and its checkpoint
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment, save_strategy="steps", save_steps=1), tmp_path, console)
    assert caught.value.code == "not-finite"
    assert [folder.name for folder in (tmp_path / "lights/sft-001/state").iterdir()] == ["checkpoint-1"]


def test_a_gradient_that_is_not_finite_names_its_rows_and_is_not_saved(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step is a number, and the weights are before the optimizer comes."""

    def poison(trainer: Any) -> None:
        parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        parameter.register_hook(lambda gradient: gradient * float("nan"))

    at_step(monkeypatch, 1, poison)
    with pytest.raises(PipelineError) as caught:
        run_sft(experiment(write_experiment, save_strategy="steps", save_steps=1), tmp_path, console)
    assert caught.value.message.startswith("the gradient is not finite at step 2, which trained on ")
    assert [folder.name for folder in (tmp_path / "lights/sft-001/state").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("fp16", [False, True])
def test_loss_scaling_is_left_to_skip_a_gradient_that_overflows(fp16: bool) -> None:
    """There is no float16 training on a CPU: what is asked of Trainer's arguments is asked of a stand-in."""
    args, guard = SimpleNamespace(fp16=fp16), Guard()
    trainer = SimpleNamespace(args=args, places=[], train_dataset=[1])
    Keeper(trainer, cast(Any, None), cast(Any, None), guard, print, None).watch_gradient(torch.tensor(float("inf")))
    assert (guard.not_finite is None) is fp16
    guard = Guard()
    state, control = SimpleNamespace(global_step=3), SimpleNamespace()
    guard.on_log(args, state, control, {"loss": 0.5, "grad_norm": float("inf")})
    assert (guard.failure is None) is fp16
    for loss in ("loss", "eval_loss"):
        guard = Guard()
        guard.on_log(args, state, control, {loss: float("nan")})
        assert guard.failure is not None


@pytest.mark.parametrize("hours", [-1, 24])
def test_a_clock_that_jumps_while_a_run_trains_does_not_touch_how_long_it_took(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    now = time.time
    at_step(monkeypatch, 1, lambda trainer: monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours))
    outcome = run_sft(experiment(write_experiment, max_steps=2), tmp_path, console)
    assert 0 < read_run(outcome.run).manifest["metrics"]["train_runtime"] < 1800
