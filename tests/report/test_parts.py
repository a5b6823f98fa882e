"""Curves, histograms and marks, each on values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import answers, curves
from pipeline.report.answers import marked, prompts_of
from pipeline.report.curves import charts_of
from pipeline.report.margins import histograms, most_wrong
from pipeline.runs.run import read_run
from tests.records import write_run


def pairs(**margins: list[float | None]) -> list[dict[str, Any]]:
    rows = zip(*margins.values(), strict=True)
    return [
        {"prompt": f"p{at}", "chosen": "c", "rejected": "r", "margins": dict(zip(margins, row, strict=True))}
        for at, row in enumerate(rows)
    ]


def test_a_histogram_counts_every_pair_once_with_an_edge_at_zero() -> None:
    (one,) = histograms(pairs(dpo=[-0.5, -0.01, 0.0, 0.01, 1.7]))
    assert sum(bar.count for bar in one.bars) == 5
    assert one.summary == "dpo: 2 of 5 pairs above 0; median 0, from -0.5 to 1.7"
    # 2.2 wide, 22 bins: a tenth each, the next round width.
    assert one.bars[0].low == pytest.approx(-0.5)
    assert {round(bar.high - bar.low, 9) for bar in one.bars} == {0.1}
    below = [bar for bar in one.bars if bar.high <= 1e-9]
    assert sum(bar.count for bar in below) == 2
    assert one.edges == [(0, pytest.approx(-0.5)), (5, 0.0), (len(one.bars), pytest.approx(1.8))]
    assert one.highest == 2


@pytest.mark.parametrize("values", [[0.3], [-0.3], [0.0, 0.0], [1e-9, 1e-9], [-1000.0, 2000.0], [0.1] * 3 + [0.7]])
def test_histograms_of_odd_margins(values: list[float]) -> None:
    (one,) = histograms(pairs(dpo=list(values)))
    assert sum(bar.count for bar in one.bars) == len(values)
    assert len(one.bars) <= 25
    assert one.bars[0].low <= 0 <= one.bars[-1].high


def test_histograms_share_an_axis_and_leave_out_what_is_not_known() -> None:
    sft, dpo = histograms(pairs(base=[None, None], sft=[-2.0, None], dpo=[0.1, 0.2]))
    assert (sft.model, dpo.model) == ("sft", "dpo")
    assert [bar.low for bar in sft.bars] == [bar.low for bar in dpo.bars]
    assert sum(bar.count for bar in sft.bars) == 1
    assert histograms(pairs(base=[None])) == []


def test_most_wrong() -> None:
    some = pairs(sft=[0.0, 0.0, 0.0, 0.0], dpo=[0.3, -0.2, None, -0.4])
    assert [(pair["prompt"], pair["margin"]) for pair in most_wrong(some, "dpo", 2)] == [("p3", -0.4), ("p1", -0.2)]
    assert [pair["prompt"] for pair in most_wrong(some, "dpo")] == ["p3", "p1", "p0"]


def test_marks() -> None:
    before, text = "It is red. Fixed by noon.", "It is dark red."
    pieces = marked(text, before)
    assert "".join(piece for piece, mark in pieces if mark != "gone") == text
    assert "".join(piece for piece, mark in pieces if mark != "new") == before
    assert ("dark ", "new") in pieces
    assert marked("same words", "same words") == [("same words", "")]
    assert marked("entirely other", "1 2 3 4 5") == [("entirely other", "")]
    assert marked("", "") == []


def test_what_does_not_fit_is_left_out(compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [prompt.number for prompt in prompts_of(compared)] == [1, 2, 3, 4]
    long = len(str(compared["samples"][0]["prompt"])) * 3
    monkeypatch.setattr(answers, "MOST_CHARACTERS", long)
    assert len(prompts_of(compared)) < 4
    monkeypatch.setattr(answers, "MOST_CHARACTERS", 10**9)
    compared["samples"][0]["outputs"]["base"] = "x" * 7000
    shown = prompts_of(compared)[0].answers[0].pieces
    assert shown == [("x" * 6000 + " [1,000 more characters]", "")]


def test_long_curves_are_thinned_but_keep_ends_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_POINTS", 10)
    lines = [{"step": step, "loss": float(step)} for step in range(1, 101)] + [{"step": 37, "eval_loss": 0.5}]
    run = write_run(tmp_path / "e" / "sft-001", "sft", lines)
    (chart,) = charts_of([run])["sft"]
    assert chart.thinned == 10
    assert chart.steps == [1, 11, 21, 31, 37, 41, 51, 61, 71, 81, 91, 100]
    assert chart.series[0].values == [float(step) for step in chart.steps]
    assert chart.series[1].values == [0.5 if step == 37 else None for step in chart.steps]
    assert chart.summary == "loss. loss: 1 at step 1, 100 at step 100; eval_loss: 0.5 at step 37"


def test_metrics_that_are_no_numbers_are_not_drawn(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 2}, {"step": 4, "loss": 1e400}]
    run = write_run(tmp_path / "e" / "sft-001", "sft", lines)
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 5, "lo')  # cut off by an interruption
    assert math.isinf(1e400)
    (chart,) = charts_of([read_run(run.path)])["sft"]
    assert (chart.steps, chart.series[0].values) == ([3], [2.0])
