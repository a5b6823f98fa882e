from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import Comparison, Sample
from pipeline.evaluation.table import print_comparison


def printed(comparison: Comparison, *, width: int = 100, terminal: bool = False, **options: Any) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    print_comparison(comparison, console, **options)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def make(models: list[str], text: str = "fine") -> Comparison:
    metrics = {
        model: {
            "ends_by_itself": Estimate(1.0, 0.929, 1.0, 50),
            "length_mean": Estimate(123.44, 100.06, 140.0, 50),
            "perplexity": Estimate(3.14159, 3.0, 3.5, 40),
            "check/no_promise": Estimate(0.5, 0.37, 0.63, 50),
            "match/severity": Estimate(0.92, 0.81, 0.97, 50),
            "json_conformance": Estimate(0.0, 0.0, 0.071, 50),
        }
        for model in models
    }
    metrics[models[-1]]["preference_accuracy"] = Estimate(0.75, 0.6, 0.86, 60)
    metrics[models[-1]]["preference_margin"] = Estimate(0.0123, -0.5, 1.5, 60)
    deltas = {
        model: {
            "json_conformance": Estimate(0.98, 0.88, 1.0, 50),
            "match/severity": Estimate(-0.02, -0.1, 0.06, 50),
            "length_mean": Estimate(-20.0, -30.0, -10.5, 50),
        }
        for model in models[1:]
    }
    checks = {model: {"json_conformance": model != "base", "ends_by_itself": True} for model in models}
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "old answer"},
        {"role": "user", "content": "The printer is on fire. " * 30},
    ]
    samples = [Sample(prompt, "ref", {model: f"{text} {model}" for model in models}, checks)]
    return Comparison(models, models[0], metrics, deltas, samples, dict.fromkeys(models, 1.0))


def row(text: str, words: str) -> list[str]:
    """The line that begins with `words`, and the next."""
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(words))
    return lines[at : at + 2]


def test_figures_in_words() -> None:
    text = printed(make(["base", "sft", "dpo"]))
    first, second = row(text, "conforms to the schema")
    assert first.split() == ["conforms", "to", "the", "schema", "50", *["0", "%", "[0,", "7]"] * 3]
    assert second.split() == ["+98", "pt", "[+88,", "+100]"] * 2
    first, second = row(text, "severity correct")
    assert first.split()[-4:] == ["92", "%", "[81,", "97]"]
    assert second.split() == ["-2", "pt", "[-10,", "+6]"] * 2
    assert row(text, "perplexity")[0].split() == ["perplexity", "40", *["3.14", "[3.00,", "3.50]"] * 3]
    first, second = row(text, "answer length, tokens")
    assert first.split()[-3:] == ["123.4", "[100.1,", "140.0]"]
    assert second.split() == ["-20.0", "[-30.0,", "-10.5]"] * 2
    # What a model does not have is a dash, not a zero.
    assert row(text, "prefers chosen answers")[0].split()[3:] == ["60", "-", "-", "75", "%", "[60,", "86]"]
    assert row(text, "reward margin")[0].split()[2:] == ["60", "-", "-", "0.0123", "[-0.500,", "1.50]"]
    assert "difference to base" in text


def test_rows_keep_one_order() -> None:
    lines = printed(make(["base", "sft"])).splitlines()
    words = (
        "conforms",
        "check no_promise",
        "severity cor",
        "ends by",
        "prefers",
        "reward",
        "perplexity",
        "answer len",
    )
    found = [next(index for index, line in enumerate(lines) if line.startswith(word)) for word in words]
    assert sorted(found[:1] + found[3:]) == found[:1] + found[3:]
    assert max(found[1:3]) < found[3]


@pytest.mark.parametrize("models", [["base", "sft", "dpo"], ["base", "triage/sft-001", "triage/sft-002", "dpo-3"]])
@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_cut_at_100_columns(models: list[str], terminal: bool) -> None:
    text = printed(make(models), terminal=terminal)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    if not terminal:
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 100
        for model in models:
            assert model in text


def test_a_sample_shows_the_last_question_and_what_failed() -> None:
    text = printed(make(["base", "sft"]))
    assert "prompt: The printer is on fire." in text
    assert "[...]" in text
    assert "old" not in text.split("prompt:")[1]
    assert text.count("passes all checks") == 1
    assert "fails: json_conformance" in text
    assert "fine base" in text
    assert "prompt:" not in printed(make(["base", "sft"]), samples=0)


def test_output_is_neither_markup_nor_control() -> None:
    text = printed(make(["base"], text="[bold]{x}[/bold] [/red] \x1b[2J\x07"), terminal=False)
    assert "[bold]{x}[/bold] [/red]" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_absent_figures_say_why() -> None:
    comparison = make(["base", "sft"])
    comparison.absent["sft"] = {"perplexity": "not finite"}
    assert "sft: no perplexity: not finite" in printed(comparison)


def test_without_a_base_there_are_no_differences() -> None:
    comparison = Comparison(["sft"], None, {"sft": {"ends_by_itself": Estimate(1, 0.9, 1, 9)}}, {}, [], {"sft": 1.0})
    assert "difference" not in printed(comparison)
