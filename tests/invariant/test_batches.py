"""8 x 1, 4 x 2 and 1 x 8 are the same training, also where the last step of an epoch is smaller; so is one that halves.

8 x 1 is held to stock TRL by `test_trajectories.py`.
"""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariant.test_trajectories import hold, run_case
from tests.invariant.trajectories import CASES

TOLERANCE = 2e-5


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_any_cut_of_a_step_is_the_same_step(stage: str, tmp_path: Path, trained: Any, require_alike: Any) -> None:
    """14 rows in steps of 8, three epochs: what stock TRL logged of 8 x 1."""
    runs = []
    for size, parts in ((4, 2), (1, 8)):
        folder = tmp_path / f"{size}x{parts}"
        folder.mkdir()
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        steps, _ = run_case(CASES[stage], folder, **cut)
        assert steps[-1]["loss"] < steps[0]["loss"]
        hold(stage, steps, figures=("loss", "grad_norm"))  # TRL's other figures are means over micro-batches
        runs.append(trained(folder / "runs" / "recorded" / f"{stage}-001"))
    require_alike(*runs, TOLERANCE)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_that_does_not_fit_goes_on_in_halves(
    stage: str, train: Any, start: Path, require_alike: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The memory holds four rows: the second step, of which one micro-batch is behind it, is done again in halves."""
    more = {} if stage == "sft" else {"start": start}
    small = train(stage, "small", per_device_train_batch_size=2, gradient_accumulation_steps=4, **more)
    name = "DemonstrationTrainer" if stage == "sft" else "PreferenceTrainer"
    trainer = getattr(importlib.import_module(f"pipeline.training.{stage}"), name)
    compute_loss = trainer.compute_loss
    calls = itertools.count(1)

    def crowded(self: Any, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, model, inputs, *rest, **kwargs)
        if model.training and next(calls) == 4:
            loss.backward()  # a part of it has reached the gradients when the memory ends
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(trainer, "compute_loss", crowded)
    halved = train(stage, "halved", per_device_train_batch_size=4, gradient_accumulation_steps=2, **more)
    require_alike(small, halved, TOLERANCE)
    assert "step 2 did not fit in the memory" in capsys.readouterr().out
    assert halved.manifest["micro_batches_cut_in"] == 2
