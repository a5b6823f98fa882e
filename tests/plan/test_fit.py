"""`gradient_checkpointing: auto`: on only where the memory does not hold the largest batch without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.experiment import Dpo, Experiment, Model, Sft
from pipeline.experiment_file import load_experiment
from pipeline.model.device import Placement, available_memory
from pipeline.plan.fit import _SHARE, needed, settle_checkpointing
from pipeline.plan.outline import find_config
from pipeline.plan.rhythm import Length
from pipeline.training.sft import run_sft

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture
def settle(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, list[str]]]:
    """The value that `auto` or another becomes with some free memory, and what is said."""

    def run(stage: type[Sft] | type[Dpo], free: int | None, value: Any = "auto", length: int = 100) -> Any:
        monkeypatch.setattr("pipeline.plan.fit.available_memory", lambda device: free)
        settings = stage(gradient_checkpointing=value, per_device_train_batch_size=2)
        one = Experiment.model_validate({"name": "sized", "model": {"id": str(tiny_folder)}})
        said: list[str] = []
        files = find_config(one.model, tokenizer=False)
        sizes = ((length, 50), (40, 20), (30, 30))
        lengths = [Length(one, loss, (10, one - 10, one - 10) if stage is Dpo else (one,)) for one, loss in sizes]
        return settle_checkpointing(settings, one, files, CPU, lengths, said.append).gradient_checkpointing, said

    return run


@pytest.mark.parametrize("stage", [Sft, Dpo])
def test_it_is_on_where_the_memory_does_not_suffice(stage: Any, settle: Any) -> None:
    assert settle(stage, 2**30) == (False, [])
    on, said = settle(stage, 2**20)
    assert on is True
    assert "gradient checkpointing is on" in said[0]
    assert settle(stage, None) == (False, [])  # a system that does not say


def test_longer_rows_need_it_sooner(settle: Any, tiny_folder: Path) -> None:
    """With half as much again free as the short rows take, there is no room for rows ten times as long."""
    short, long = (
        needed(
            Sft(per_device_train_batch_size=2),
            Experiment.model_validate({"name": "sized", "model": {"id": str(tiny_folder)}}),
            find_config(Model(id=str(tiny_folder)), tokenizer=False),
            CPU,
            [Length(length, 50, (length,)), Length(40, 20, (40,))],
            checkpointing=False,
        ).total
        for length in (100, 1000)
    )
    assert short is not None
    assert long is not None
    assert long > 1.6 * short
    free = round(1.5 * short / _SHARE)
    assert settle(Sft, free, length=100)[0] is False
    assert settle(Sft, free, length=1000)[0] is True


def test_what_is_asked_for_stays(settle: Any) -> None:
    assert settle(Sft, 2**20, value=False) == (False, [])
    assert settle(Sft, 2**40, value=True) == (True, [])


def test_a_run_trains_with_what_was_settled(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.plan.fit.available_memory", lambda device: 2**20)
    changes = {"gradient_checkpointing": "auto", "max_steps": 1}
    seen: list[bool] = []
    monkeypatch.setattr(
        "pipeline.training.sft.train",
        lambda trainer, *rest, **more: seen.append(trainer.args.activation_checkpointing) or {"loss": 0.0},
    )
    run_sft(load_experiment(write_experiment(sft=changes)).experiment, tmp_path / "runs", console)
    assert seen == [True]
    assert "gradient checkpointing is on" in console.file.getvalue()


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = available_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = available_memory(torch.device("cpu"))
    if alone is not None and shared is not None:
        assert shared < alone / 3
