"""The list of runs, and what differs between them, from records written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.runs.differences import disagreements, flat, run_differences
from pipeline.runs.listing import listed, print_differences, print_runs
from pipeline.runs.lock import locked
from pipeline.runs.run import read_run
from tests.records import comparison, definition, estimate, write_run, write_runs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    compared = comparison()
    compared["versions"] = {"sft": {"run": "lights/sft-001"}, "dpo": {"run": "lights/dpo-001"}}
    compared["verdict"]["scores"] = {"sft": estimate(0.5, 0, 1), "dpo": estimate(0.75, 0, 1)}
    write_runs(root, compared)
    metrics = [
        {"step": 1, "eval_loss": 0.7, "eval_rewards/accuracies": 0.9, "eval_rewards/margins": 0.1},
        {"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies": 0.8, "eval_rewards/margins": 0.4},
        {"step": 3, "eval_loss": None},
    ]
    write_run(
        root / "lights" / "dpo-002",
        "dpo",
        metrics,
        status="failed",
        start="2026-11-21T10:00:00+00:00",
        definition=definition(dpo={"beta": 0.5}),
        trainable={"trainable_parameters": 1200, "trainable_percent": 1.78, "groups": {"adapter": 1, "opened": 1}},
    )
    write_run(root / "other" / "sft-001", "sft", [{"step": 1, "eval_loss": 0.6}])
    return root


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def test_best_figures(root: Path) -> None:
    rows = {row["name"]: row for row in listed(root)}
    assert rows["lights/dpo-002"]["best"] == {
        "eval_loss": 0.5, "eval_rewards/accuracies": 0.9, "eval_rewards/margins": 0.4
    }  # fmt: skip
    assert rows["lights/dpo-001"]["best"] == {"checks_passed": 0.75}
    assert rows["lights/sft-001"]["best"] == {"eval_loss": 1.25}
    row = rows["lights/dpo-001"]
    assert (row["stage"], row["status"], row["parent"]) == ("dpo", "finished", "lights/sft-001")
    assert row["base"] == "/models/tiny"


def test_filters_and_sorts(root: Path) -> None:
    assert names(listed(root, experiment="other")) == ["other/sft-001"]
    assert names(listed(root, stage="sft")) == ["lights/sft-001", "other/sft-001"]
    assert names(listed(root, status="failed")) == ["lights/dpo-002"]
    best = ["lights/dpo-002", "other/sft-001", "lights/sft-001"]
    assert names(listed(root, sort="loss")) == [*best, "lights/dpo-001"]
    assert names(listed(root, sort="loss", reverse=True)) == [*best[::-1], "lights/dpo-001"]
    assert names(listed(root, sort="start"))[0] == "lights/dpo-002"
    assert names(listed(root, sort="checks"))[0] == "lights/dpo-001"
    assert names(listed(root, sort="accuracy"))[0] == "lights/dpo-002"


def test_the_table(root: Path, console: Any) -> None:
    print_runs(listed(root), console)
    printed = console.file.getvalue()
    assert "1.8 % +opened" in printed
    line = next(line for line in printed.splitlines() if "lights/dpo-002" in line)
    assert line.split()[-4:] == ["0.500", "90%", "0.400", "-"]


def test_what_differs(root: Path, console: Any) -> None:
    one, other = (read_run(root / "lights" / name) for name in ("dpo-001", "dpo-002"))
    found = run_differences([one, other])
    assert found["experiment"]["dpo.beta"] == [0.2, 0.5]
    assert "dpo.loss_type" not in found["experiment"]
    assert found["versions"]["parent"] == ["lights/sft-001", None]
    assert "torch" not in found["versions"]
    assert found["results"]["status"] == ["finished", "failed"]
    assert found["results"]["compare/check/polite"] == [1.0, None]
    print_differences(["a", "b"], found, console)
    assert "data: no difference" in console.file.getvalue()
    assert run_differences([one, one]) == {"experiment": {}, "data": {}, "versions": {}, "results": {}}


def test_data_differs_by_hash_and_not_by_path(tmp_path: Path) -> None:
    def run(name: str, path: str, sha256: str) -> Any:
        entry = {"path": path, "use": "train", "kind": "preference", "sha256": sha256, "rows": 4}
        moved = definition(data={"preferences": {"train": path}})
        return write_run(tmp_path / "e" / name, "dpo", [], data=[entry], definition=moved)

    here, there, other = run("dpo-001", "/a/x", "1"), run("dpo-002", "/b/x", "1"), run("dpo-003", "/b/x", "2")
    assert run_differences([here, there])["data"] == {}
    assert run_differences([here, there])["experiment"] == {}
    assert run_differences([there, other])["data"] == {"preference.train.sha256": ["1", "2"]}


def test_parts() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [{"e": 1}]}) == {"a.b": 1, "d": [{"e": 1}]}
    assert disagreements([{"a": 1, "b": 2}, {"b": 2, "c": 3}]) == {"a": [1, None], "c": [None, 3]}
    assert json.dumps(disagreements([{"a": 1}, {"a": 1}])) == "{}"


def test_a_run_whose_process_is_gone_is_dead(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(root / "other" / "sft-002", "sft", [], status="running")
    with locked(run.path):
        assert names(listed(root, status="running")) == ["other/sft-002"]
    assert names(listed(root, status="running")) == []
    rows = listed(root, status="dead")
    assert names(rows) == ["other/sft-002"]
    print_runs(rows, Console(width=200))
    assert "other/sft-002 is dead, its process is gone: `pipeline sft EXPERIMENT --resume sft-002`" in (
        capsys.readouterr().out
    )
