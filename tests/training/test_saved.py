"""What the proof says of a run that saves something else than it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.runs.run import read_run
from pipeline.training import dpo as dpo_module
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft


def test_a_run_that_saves_less_than_it_trained_fails(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter of one layer is lost on the way to the disk, as opened weights are in a naive recipe."""
    save = dpo_module.save_adapter

    def lossy(policy: Any, tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "layers.1.mlp.up_proj.lora_B.default" in name:
                    parameter.zero_()
        save(policy, tokenizer, folder)

    monkeypatch.setattr(dpo_module, "save_adapter", lossy)
    experiment = load_experiment(write_experiment(dpo={"learning_rate": 5.0e-2})).experiment
    run_sft(experiment, tmp_path, console)
    with pytest.raises(PipelineError, match="saved adapter is not the trained policy"):
        run_dpo(experiment, tmp_path, console)
    run = read_run(tmp_path / "lights/dpo-001")
    assert (run.status, run.manifest["error"]["code"]) == ("failed", "saved-differs")
