"""8 x 1, 4 x 2 and 1 x 8 are the same training, also where the last step of an epoch is smaller; so is one that halves.

The trajectory of each class is recorded in `recorded.json`, with what it was recorded on. Another figure there means
that training has changed: `python -m pytest tests/invariant --record` writes the file anew, and the commit says why.
"""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.runs.provenance import provenance

RECORDED = Path(__file__).with_name("recorded.json")
ENVIRONMENT = ("python", "torch", "transformers", "trl", "peft", "accelerate")
TOLERANCE = 2e-5
RECORDED_TOLERANCE = 1e-3
CUTS = {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}


def cut(name: str) -> dict[str, int]:
    size, steps = CUTS[name]
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_any_cut_of_a_step_is_the_same_step(
    stage: str, train: Any, start: Path, require_alike: Any, request: pytest.FixtureRequest
) -> None:
    more = {} if stage == "sft" else {"start": start}
    whole, *others = (train(stage, name, **cut(name), **more) for name in CUTS)
    assert len(whole.losses) == 6  # 14 rows in steps of 8, three epochs
    assert whole.losses[-1] < whole.losses[0]
    for other in others:
        require_alike(whole, other, TOLERANCE)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if request.config.getoption("--record"):
        versions = {name: provenance()["versions"][name] for name in ENVIRONMENT}
        entry = {"versions": versions, "losses": [round(loss, 5) for loss in whole.losses]}
        RECORDED.write_text(json.dumps({**recorded, stage: entry}, indent=2) + "\n")
    else:
        assert whole.losses == pytest.approx(recorded[stage]["losses"], abs=RECORDED_TOLERANCE), recorded[stage]


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
