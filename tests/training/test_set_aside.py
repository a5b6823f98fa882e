"""The gate in front of both stages: what `data.on_invalid` does with rows that cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ExitCode, PipelineErrors
from pipeline.experiment_file import load_experiment
from pipeline.runs.run import read_run
from pipeline.training import sft
from pipeline.training.sft import run_sft


@pytest.fixture
def data(tiny_data: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """The tiny demonstrations, and behind them one without content, one with a control token, one too long."""
    file = tmp_path / "demonstrations.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": content}]}
        for prompt, content in (("hi", ""), ("hi", "yes<|im_end|>"), ("x" * 200, "yes"))
    ]
    file.write_text(tiny_data["demonstrations"].read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    return {"demonstrations": {"train": str(file)}}


def test_refused_before_a_model_is_loaded(
    write_experiment: Any, data: dict[str, Any], tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "load_base", lambda *_: pytest.fail("a model was loaded"))
    file = Path(data["demonstrations"]["train"])
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:12] + lines[13:]))  # without the row that is wrong before it is tokenised
    experiment = load_experiment(write_experiment(data=data)).experiment
    with pytest.raises(PipelineErrors) as caught:
        run_sft(experiment, tmp_path / "runs", console)
    assert caught.value.exit_code is ExitCode.WRONG
    found = [(error.code, error.line) for error in caught.value.errors]
    assert found == [("invalid-rows", None), ("control-token", 13), ("nothing-in-loss", 14)]
    assert not (tmp_path / "runs").exists()


def test_set_aside(write_experiment: Any, data: dict[str, Any], tmp_path: Path, console: Any) -> None:
    changes = {"data": {**data, "on_invalid": "set-aside"}, "sft": {"max_steps": 1}}
    experiment = load_experiment(write_experiment(**changes)).experiment
    run = read_run(run_sft(experiment, tmp_path / "runs", console).run)
    kept = [json.loads(line) for line in (run.path / "set-aside.jsonl").read_text().splitlines()]
    assert [(row["line"], row["codes"]) for row in kept] == [
        (13, ["empty-content"]),
        (14, ["control-token"]),
        (15, ["nothing-in-loss"]),
    ]
    entry = run.manifest["data"][0]
    assert (entry["rows"], entry["tokens"]["used"], entry["set_aside"]["rows"]) == (15, 12, 3)
    assert entry["set_aside"]["codes"] == {"empty-content": 1, "control-token": 1, "nothing-in-loss": 1}
    assert "3 rows cannot be trained on" in console.file.getvalue()


def test_no_file_where_nothing_is_wrong(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    experiment = load_experiment(write_experiment(sft={"max_steps": 1})).experiment
    assert not (run_sft(experiment, tmp_path / "runs", console).run / "set-aside.jsonl").exists()
