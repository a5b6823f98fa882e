"""The page: whole, escaped, its figures those of the run's files, and nothing in it that asks for the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.report.page import render, write_report
from pipeline.runs.run import Run, read_run
from tests.records import HOSTILE, definition, write_run

BLOCKS = {"p", "li", "dt", "dd", "td", "th", "h2", "h3", "h4", "caption", "figcaption", "summary", "option"}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, text by section, and whether every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._section = "head"
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "br":
            self.handle_data(" ")
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in BLOCKS:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


@pytest.fixture
def html(root: Path, dpo: Run) -> str:
    return render([dpo], root)


@pytest.fixture
def page(html: str) -> Page:
    return Page(html)


def test_text_of_users_and_models_is_text(page: Page, html: str) -> None:
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [one.get("type") for one in scripts] == ["application/json", None]
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object")]
    for section in ("verdict", "health", "data", "margins", "answers", "lineage"):
        assert HOSTILE.replace("/", "_") in page.text(section) or HOSTILE in page.text(section), section
    assert html.count("<script") == 2


def test_it_asks_nothing_of_the_network_and_runs_no_other_script(page: Page, html: str) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:,")), (tag, name, target)
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(one["content"] for tag, one in page.elements if tag == "meta" and "http-equiv" in one)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)
    assert len(html) < 5_000_000
    assert "@import" not in html
    assert "url(" not in html


def test_verdict_first_with_its_figures(page: Page) -> None:
    text = page.text("verdict")
    assert list(page.sections)[1:3] == ["verdict", "health"]
    assert text.startswith("Verdict dpo should survive")
    assert "Better than base beyond chance: check polite." in text
    assert "Worse than sft beyond chance: perplexity." in text
    assert (
        "check polite 4 25 % [5, 70] 50 % [15, 85] +25 pt [-20, +60] 100 % [51, 100] better +75 pt [+20, +90]" in text
    )
    assert "reward margin 4 - -0.730 [-1.50, 0.0400] 0.300 [0.210, 0.410]" in text
    assert "sft has no kl: not finite." in text


def test_health_data_proof_lineage(page: Page) -> None:
    assert "sft-001, step 2: grad-spike 9.5 a spike" in page.text("health")
    assert "dpo-001: no rule found anything." in page.text("health")
    assert "train 12 11 1,234 567 64 1 (control-token: 1) da7ada7ada7a" in page.text("data")
    assert "completion-cut: 1 rows; 1 rows longer than 64 tokens" in page.text("data")
    assert "loss 0.693147" in page.text("proof")
    assert "0 nats between the first step and the last, on 8 pairs" in page.text("proof")
    lineage = page.text("lineage")
    order = [lineage.index(part) for part in ("/models/tiny", "ba5e" * 16, "lights/sft-001", "lights/dpo-001")]
    assert order == sorted(order)
    assert "c0ffee, with uncommitted changes" in lineage
    assert "torch 2.13.0, peft 0.21.2" in lineage


def test_what_was_asked(page: Page) -> None:
    text = page.text("asked")
    assert "LoRA of rank 4, alpha 8, on the query and value projections of attention, in all blocks" in text
    assert "2 epochs of 4 rows at learning rate 0.05 (cosine), up to 1,024 tokens a row" in text
    assert (
        "sigmoid loss, beta 0.2; 3 steps of 8 rows at learning rate 5e-05 (cosine, warm-up 10 % of the steps)" in text
    )
    assert "beside the adapter the last 1 blocks, the head at 5e-06" in text
    assert "has the reference's colour; polite: must not match soon" in text


def test_charts_are_those_of_metrics_jsonl(html: str, root: Path) -> None:
    data = json.loads(re.search(r'id="chart-data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    by_id = {chart["id"]: chart for chart in data}
    lines = [json.loads(line) for line in (root / "lights/dpo-001/metrics.jsonl").read_text().splitlines()]
    assert by_id["dpo-reward-margin"]["steps"] == [1, 2, 3]
    assert by_id["dpo-reward-margin"]["series"][0]["values"] == [line["rewards/margins"] for line in lines]
    assert [one["label"] for one in by_id["dpo-learning-rate"]["series"]] == ["learning_rate", "learning_rate/opened"]
    assert by_id["sft-loss"]["series"] == [
        {"label": "loss", "values": [3.0, 1.5], "points": False},
        {"label": "eval_loss", "values": [None, 1.25], "points": True},
    ]
    for chart in by_id:
        assert f'id="{chart}"' in html


def test_the_pairs_most_wrong_come_first(page: Page) -> None:
    text = page.text("margins")
    assert "The 10 pairs that dpo gets most wrong margin -0.250" in text
    assert text.index("margin -0.250") < text.index("margin -0.150") < text.index("margin 0.650")
    assert "margin 0.850" not in text


def test_everything_has_a_name(page: Page) -> None:
    labelled = {one.get("for") for tag, one in page.elements if tag == "label"}
    for tag, one in page.elements:
        if tag == "select":
            assert one["id"] in labelled
        if tag in ("section", "article"):
            assert one["aria-labelledby"] in {other.get("id") for _, other in page.elements}
        if tag == "svg":
            assert one.get("aria-label") or one.get("aria-hidden") == "true"
        if tag == "nav" or one.get("role") == "region":
            assert one["aria-label"]
    assert ("html", {"lang": "en"}) in page.elements


def test_two_runs_side_by_side(root: Path) -> None:
    other = write_run(
        root / "lights" / "dpo-002",
        "dpo",
        [{"step": 1, "loss": 0.5}],
        definition=definition(dpo={"beta": 0.5}),
        parent="lights/sft-001",
        versions={"torch": "2.14.0", "peft": "0.21.2"},
    )
    html = render([read_run(root / "lights" / "dpo-001"), other], root)
    text = Page(html).text("asked")
    assert "What differs between the runs" in text
    assert "dpo.beta 0.2 0.5" in text
    assert "torch 2.13.0 2.14.0" in text
    assert "dpo-002 loss" in html
    assert html.count("SFT adapter</span>") == 2  # both lineages


def test_a_run_that_was_never_compared_and_failed(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "c" / "e" / "sft-001", "sft", [], status="failed", error={"code": "disk", "message": "full"}
    )
    page = Page(render([run], tmp_path / "c"))
    assert "Nothing was compared yet: pipeline compare e/sft-001" in page.text("verdict")
    assert "no watch over its health was recorded" in page.text("health")
    assert "No step was logged" in page.text("curves")
    assert "Ended with full [disk]" in page.text("lineage")
    assert "No run here has finished" in page.text("load")


def test_where_it_is_written(root: Path, dpo: Run, tmp_path: Path) -> None:
    assert write_report([dpo], root) == dpo.path / "report.html"
    assert (dpo.path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    elsewhere = tmp_path / "here.html"
    assert write_report([dpo], root, elsewhere) == elsewhere
    with pytest.raises(PipelineError, match="cannot be written"):
        write_report([dpo], root, tmp_path / "no" / "such" / "folder.html")


def test_an_older_comparison_without_pairs_and_verdict(root: Path, dpo: Run, compared: dict[str, Any]) -> None:
    old = {key: compared[key] for key in ("models", "base", "metrics", "deltas", "absent", "seconds", "samples")}
    (dpo.path / "compare.json").write_text(json.dumps(old))
    page = Page(render([dpo], root))
    assert "names no verdict" in page.text("verdict")
    assert "No margins of held-out pairs were recorded" in page.text("margins")
