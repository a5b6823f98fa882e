from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment_file import load_experiment
from pipeline.runs.checkpoints import COUNTERS, new_checkpoint
from pipeline.runs.lock import locked
from pipeline.runs.resume import Resume, changes_since, find_resumption, require_unchanged
from pipeline.runs.run import Run, create_run, read_run

MANIFEST: dict[str, Any] = {
    "data": [{"use": "train", "path": "a.jsonl", "sha256": "aa", "rows": 12}],
    "base": {"id": "a", "sha256": "bb", "quantize": "none"},
    "tokenizer": {"template_sha256": "cc"},
    "placement": {"device": "cpu", "dtype": "float32", "world_size": 1},
    "versions": dict.fromkeys(
        ("python", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "numpy"), "1.0"
    ),
}


def begun(root: Path, *steps: int, stage: Any = "sft", status: Any = "interrupted") -> Run:
    run = create_run(root, "lights", stage, "name: lights\n", MANIFEST)
    for step in steps:
        with new_checkpoint(run.path / "state", step) as folder:
            position = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
            (folder / COUNTERS).write_text(json.dumps({"metrics": position}))
    run.end(status)
    return run


def find(root: Path, said: list[str] | None = None, **asked: Any) -> Any:
    heard = [] if said is None else said
    return find_resumption(root, "lights", "sft", Resume(**asked), heard.append)


def refusal(root: Path, **asked: Any) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        find(root, **asked)
    return caught.value


def test_the_newest_run_is_the_one_with_the_highest_number_whatever_the_clock_says(tmp_path: Path) -> None:
    begun(tmp_path, 5)
    newest = begun(tmp_path, 2, 4)
    newest.update(start="1999-01-01T00:00:00+00:00")
    begun(tmp_path, 9, stage="dpo")
    found = find(tmp_path)
    assert (found.run.path, found.checkpoint.step) == (newest.path, 4)


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_what_did_not_finish_goes_on(tmp_path: Path, status: str) -> None:
    begun(tmp_path, 3, status=status)
    said: list[str] = []
    assert find(tmp_path, said).checkpoint.step == 3
    assert said == [f"resumed: {tmp_path}/lights/sft-001 at step 3"]


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    begun(tmp_path, 3)
    begun(tmp_path, 3, status="finished")
    assert refusal(tmp_path).code == "nothing-to-resume"
    assert find(tmp_path, run="sft-001").run.name == "lights/sft-001"
    assert find(tmp_path, run="lights/sft-001").run.name == "lights/sft-001"
    assert find(tmp_path, run=str(tmp_path / "lights/sft-001")).run.name == "lights/sft-001"
    assert refusal(tmp_path, run="lights/sft-002").code == "nothing-to-resume"


def test_another_stage_is_no_run_of_this_one(tmp_path: Path) -> None:
    begun(tmp_path, 3, stage="dpo")
    assert refusal(tmp_path, run="lights/dpo-001").code == "other-run"
    assert refusal(tmp_path).code == "nothing-to-resume"


def test_why_checkpoints_are_passed_over_is_said(tmp_path: Path) -> None:
    run = begun(tmp_path, 2, 4)
    (run.path / "state/checkpoint-4/checkpoint.json").unlink()
    said: list[str] = []
    assert find(tmp_path, said).checkpoint.step == 2
    assert said[0] == "checkpoint-4 is passed over: it has no checkpoint.json, so it was never completed"
    (run.path / "state/checkpoint-2" / COUNTERS).write_text("{}")
    refused = refusal(tmp_path)
    assert refused.code == "no-checkpoint"
    assert "checkpoint-4: it has no checkpoint.json" in refused.message
    assert "checkpoint-2: counters.json has" in refused.message


def test_a_run_without_a_checkpoint_is_said_so(tmp_path: Path) -> None:
    begun(tmp_path)
    assert "stopped before the first one" in refusal(tmp_path).message


def test_a_run_that_is_written_to_is_left_alone(tmp_path: Path) -> None:
    run = begun(tmp_path, 3)
    with locked(run.path):
        assert refusal(tmp_path).code == "run-locked"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"data": [{**MANIFEST["data"][0], "sha256": "ab", "rows": 11}]},
            "SHA-256 aa then, 11 rows",
        ),
        ({"data": []}, "data of train: 12 rows, SHA-256 aa then, none now"),
        ({"base": {**MANIFEST["base"], "sha256": "b2"}}, "base weights: bb then, b2 now"),
        ({"tokenizer": {"template_sha256": "c2"}}, "chat template: cc then, c2 now"),
        ({"placement": {**MANIFEST["placement"], "world_size": 2}}, "processes (world size): 1 then, 2 now"),
        ({"placement": {**MANIFEST["placement"], "device": "cuda"}}, "device: cpu then, cuda now"),
        ({"placement": {**MANIFEST["placement"], "dtype": "bfloat16"}}, "precision: float32 then, bfloat16 now"),
        ({"base": {**MANIFEST["base"], "quantize": "nf4"}}, "quantisation: none then, nf4 now"),
        *(
            ({"versions": {**MANIFEST["versions"], library: "1.1"}}, f"version of {library}: 1.0 then, 1.1 now")
            for library in MANIFEST["versions"]
        ),
    ],
    ids=["data", "no-data", "base", "template", "world-size", "device", "precision", "quantize", *MANIFEST["versions"]],
)
def test_each_change_of_the_ground_is_named(
    tmp_path: Path, write_experiment: Any, change: dict[str, Any], said: str
) -> None:
    run, same = begun(tmp_path, 3), load_experiment(write_experiment()).experiment
    assert changes_since(run, same, same, MANIFEST) == []
    changes = changes_since(run, same, same, {**MANIFEST, **change})
    assert [said in str(one) for one in changes] == [True]
    with pytest.raises(PipelineErrors) as caught:
        require_unchanged(run, changes, accepted=False)
    assert caught.value.code == "changed-since"
    require_unchanged(run, changes, accepted=True)


def test_what_a_stage_trains_with_is_compared_and_nothing_else(tmp_path: Path, write_experiment: Any) -> None:
    run = begun(tmp_path, 3)
    then = load_experiment(write_experiment()).experiment
    now = load_experiment(
        write_experiment(seed=4, sft={"learning_rate": 0.5}, dpo={"beta": 0.7}, evaluation={"max_new_tokens": 5})
    ).experiment
    changes = [str(change) for change in changes_since(run, then, now, MANIFEST)]
    assert changes == ["`seed`: 3 then, 4 now", "`sft.learning_rate`: 0.05 then, 0.5 now"]


def test_read_back(tmp_path: Path) -> None:
    assert read_run(begun(tmp_path).path).number == 1


@pytest.mark.parametrize("name", ["state", "adapter", "metrics.jsonl", "run.json", "experiment.yaml"])
def test_no_link_is_followed_out_of_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    root, outside = tmp_path / "runs", tmp_path / "outside"
    run = begun(root, 3)
    if (run.path / name).exists():
        (run.path / name).rename(outside)
    (run.path / name).symlink_to(outside)
    assert refusal(root).code == "outside"


def test_a_run_behind_a_link_is_not_gone_on_with(tmp_path: Path) -> None:
    begun(tmp_path / "elsewhere", 3)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/lights").symlink_to(tmp_path / "elsewhere/lights")
    assert refusal(tmp_path / "runs").code == "outside"


def test_a_run_is_not_begun_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/lights").symlink_to(tmp_path / "outside")
    with pytest.raises(PipelineError) as caught:
        begun(tmp_path / "runs", 3)
    assert caught.value.code == "outside"
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("steps", [[], [5]])
def test_a_folder_of_runs_may_itself_be_a_link(tmp_path: Path, steps: list[int]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert begun(tmp_path / "runs", *steps).path.exists()
