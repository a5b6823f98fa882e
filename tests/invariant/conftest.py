"""Runs of the real command on the tiny model, without dropout: it draws other numbers for other micro-batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli import main


class Trained(NamedTuple):
    """What a run leaves."""

    losses: list[float]
    norms: list[float]
    """Of the gradient, before clipping."""
    weights: dict[str, torch.Tensor]
    manifest: dict[str, Any]


def read_trained(run: Path) -> Trained:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    manifest = json.loads((run / "run.json").read_text())
    return Trained([line["loss"] for line in steps], [line["grad_norm"] for line in steps], weights, manifest)


@pytest.fixture
def trained() -> Callable[[Path], Trained]:
    """Reads what a run left."""
    return read_trained


@pytest.fixture
def fourteen(tiny_data: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Fourteen rows of each kind: in batches of eight the last one is of six, in micro-batches of four and two."""
    files = {}
    for kind in ("demonstrations", "preferences"):
        lines = tiny_data[kind].read_text().splitlines()
        files[kind] = tmp_path / f"{kind}.jsonl"
        files[kind].write_text("\n".join([*lines, *(line.replace("I see", "Now I see") for line in lines[:2])]) + "\n")
    return files


@pytest.fixture
def settings(fourteen: dict[str, Path]) -> dict[str, Any]:
    """Changes of the experiment: the fourteen rows, a rate that trains without chaos, no rounded gradients."""
    rhythm = {"num_train_epochs": 3, "warmup_steps": 0, "eval_strategy": "no", "save_strategy": "no"}
    return {
        "data": {kind: {"train": str(path)} for kind, path in fourteen.items()},
        "scope": {"lora": {"r": 4, "lora_alpha": 8}},
        "engine": {"precision": "exact"},
        "sft": {**rhythm, "learning_rate": 5.0e-3},
        "dpo": {**rhythm, "learning_rate": 2.0e-3},
    }


@pytest.fixture
def train(write_experiment: Any, settings: dict[str, Any], tmp_path: Path) -> Callable[..., Trained]:
    """`train("sft", "name", per_device_train_batch_size=4)`: one run; DPO starts from `start`."""

    def run(stage: str, name: str, *, start: Path | None = None, **changes: Any) -> Trained:
        file = write_experiment(**{**settings, stage: {**settings[stage], **changes}})
        command = [stage, str(file), "--checkpoints", str(tmp_path / name)]
        assert main([*command, *(["--from", str(start)] if start else [])]) == 0
        return read_trained(tmp_path / name / "lights" / f"{stage}-001")

    return run


@pytest.fixture
def start(train: Any, tmp_path: Path) -> Path:
    """An adapter for DPO to start from."""
    train("sft", "start", max_steps=2)
    return tmp_path / "start" / "lights" / "sft-001" / "adapter"


@pytest.fixture
def require_alike() -> Callable[..., None]:
    """Asserts the same steps: losses and gradient norms within `tolerance`, weights within ten times that."""

    def compare(one: Trained, other: Trained, tolerance: float) -> None:
        assert len(one.losses) == len(other.losses)
        assert one.losses == pytest.approx(other.losses, abs=tolerance)
        assert one.norms == pytest.approx(other.norms, rel=tolerance, abs=tolerance)
        assert one.weights.keys() == other.weights.keys()
        for name, weight in one.weights.items():
            assert torch.allclose(weight, other.weights[name], atol=10 * tolerance), name

    return compare
