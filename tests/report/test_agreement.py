"""One run through the real commands: what metrics.jsonl, W&B's offline file, compare.json and the report say agrees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.align import align
from pipeline.evaluation.wording import number_text
from pipeline.experiment_file import load_experiment
from tests.test_tracking import history, offline_records


def test_the_figures_agree(
    write_experiment: Callable[..., Path], tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    changes = {"sft": {"max_steps": 3}, "dpo": {"max_steps": 3}, "tracking": {"wandb": {"mode": "offline"}}}
    experiment = load_experiment(write_experiment(**changes)).experiment
    outcomes, comparison, report = align(experiment, tmp_path / "checkpoints", console)
    html = report.read_text(encoding="utf-8")
    charts = json.loads(re.search(r'id="chart-data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]

    for outcome, stage in zip(outcomes, ("sft", "dpo"), strict=True):
        assert outcome.run is not None
        lines = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
        kept = {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}
        manifest = json.loads((outcome.run / "run.json").read_text())
        newest = {name: value for line in lines for name, value in line.items() if name != "step"}
        # The manifest has times and speeds as well, which differ from one hour to the next.
        assert {name: value for name, value in manifest["metrics"].items() if name in newest} == newest
        mirrored = {
            (row["_step"], name): value
            for row in history(offline_records(outcome.run))
            for name, value in row.items()
            if isinstance(value, int | float) and (row["_step"], name) in kept
        }
        assert mirrored == kept
        drawn = {
            (step, one["label"]): value
            for chart in charts
            if chart["id"].startswith(stage)
            for one in chart["series"]
            for step, value in zip(chart["steps"], one["values"], strict=True)
            if value is not None
        }
        assert drawn
        assert drawn == {key: kept[key] for key in drawn}
        assert {(line["step"], "loss") for line in lines if "loss" in line} <= drawn.keys()

    compared = json.loads((report.parent / "compare.json").read_text(encoding="utf-8"))
    assert compared == json.loads(json.dumps(comparison.as_dict()))
    shown = " ".join(re.sub(r"<[^>]*>", " ", html.split('id="verdict"')[1].split('id="health"')[0]).split())
    for metrics in compared["metrics"].values():
        for name, figure in metrics.items():
            assert f"{number_text(figure['value'], name)} " in shown, name
    margins = [pair["margins"]["dpo"] for pair in compared["pairs"]]
    assert compared["metrics"]["dpo"]["preference_margin"]["value"] == pytest.approx(sum(margins) / len(margins))
    assert f"margin {min(margins):.3f}" in html
    assert compared["verdict"]["sentence"].replace("'", "&#39;") in html
