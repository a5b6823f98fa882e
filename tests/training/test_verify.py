from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.runs.run import Run, read_run
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft
from pipeline.training.verify import as_dict, verify_run

OPENED = {"last_blocks": 1, "final_norm": True, "lm_head": True, "learning_rate": 1.0e-3}


@pytest.fixture
def runs(write_experiment: Any, tmp_path: Path, console: Any, tiny_data: dict[str, Path]) -> dict[str, Run]:
    """Both stages; the data is a copy that a test may change."""
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_bytes(tiny_data["preferences"].read_bytes())
    path = write_experiment(
        data={
            "demonstrations": {"train": str(tiny_data["demonstrations"])},
            "preferences": {"train": str(preferences)},
        },
        dpo={"unfreeze": OPENED, "max_steps": 3},
    )
    experiment = load_experiment(path).experiment
    sft = run_sft(experiment, tmp_path / "runs", console).run
    dpo = run_dpo(experiment, tmp_path / "runs", console).run
    return {"sft": read_run(sft), "dpo": read_run(dpo)}


def verified(run: Run, root: Path, console: Any) -> dict[str, tuple[bool, str]]:
    experiment = load_experiment(run.path / "experiment.yaml").experiment
    found = verify_run(run, experiment, root, console)
    assert as_dict(run, found)["ok"] == all(finding.ok for finding in found)
    return {finding.name: (finding.ok, finding.message) for finding in found}


def test_an_untouched_run_holds(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    found = verified(runs["dpo"], tmp_path / "runs", console)
    assert {name for name, (ok, _) in found.items() if not ok} == set()
    assert found["policy log-probabilities"][1].startswith("0 nats")
    assert found["reference log-probabilities"][1].startswith("0 nats")
    assert all(ok for ok, _ in verified(runs["sft"], tmp_path / "runs", console).values())


def test_a_start_in_another_folder_of_runs_is_found_again(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    experiment = load_experiment(runs["dpo"].path / "experiment.yaml").experiment
    elsewhere = tmp_path / "elsewhere"
    run = read_run(run_dpo(experiment, elsewhere, console, start=str(runs["sft"].path)).run)
    assert run.manifest["parent"] == str(runs["sft"].path.resolve())
    assert {name for name, (ok, _) in verified(run, elsewhere, console).items() if not ok} == set()


def test_a_changed_policy_is_seen(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    file = runs["dpo"].adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.model.layers.3.mlp.up_proj.weight"] *= 3
    save_file(weights, file, metadata={"format": "pt"})
    found = verified(runs["dpo"], tmp_path / "runs", console)
    assert {name for name, (ok, _) in found.items() if not ok} == {
        "adapter",
        "files",
        "policy log-probabilities",
    }
    assert found["files"][1] == "adapter/adapter_model.safetensors differs"


def test_a_changed_reference_is_seen(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    file = runs["sft"].adapter / "adapter_model.safetensors"
    save_file({name: 3 * weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    found = verified(runs["dpo"], tmp_path / "runs", console)
    assert {name for name, (ok, _) in found.items() if not ok} == {
        "reference adapter",
        "reference hash",
        "reference log-probabilities",
    }


def test_changed_and_lost_data_are_seen(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    with (tmp_path / "preferences.jsonl").open("a") as stream:
        stream.write("\n")
    found = verified(runs["dpo"], tmp_path / "runs", console)
    assert {name for name, (ok, _) in found.items() if not ok} == {"data preferences.jsonl"}
    (tmp_path / "preferences.jsonl").unlink()
    assert "cannot be read" in verified(runs["dpo"], tmp_path / "runs", console)["data preferences.jsonl"][1]


def test_a_lost_sft_run_is_said(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    (runs["sft"].path / "run.json").unlink()
    found = verified(runs["dpo"], tmp_path / "runs", console)
    assert found["reference adapter"][0] is False


def test_only_finished_runs(runs: dict[str, Run], tmp_path: Path, console: Any) -> None:
    runs["dpo"].end("failed")
    with pytest.raises(PipelineError, match="is failed"):
        verified(runs["dpo"], tmp_path / "runs", console)
