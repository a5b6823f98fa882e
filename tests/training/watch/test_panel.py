from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.training.watch.panel import Status, progress_bar, sparkline


def drawn(status: Status, width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False, soft_wrap=True
    )  # soft_wrap: as the command has it
    console.print(status)
    file.seek(0)
    return file.read()


@pytest.fixture
def status() -> Status:
    return Status(
        "dpo",
        step=12,
        steps=20,
        elapsed=83.4,
        left=55,
        curves={
            "loss": [0.69, 0.65, 0.62, 0.58],
            "rewards/margins": [0, 0.1, 0.2, 0.3],
            "rewards/accuracies": [0, 0.5, 1, 1],
        },
        held_out={"loss": 0.5962, "rewards/margins": 0.2203},
        tokens_per_second=1234.4,
        memory=3 * 2**29,
        learning_rates={"adapter": 3e-5, "opened": 5e-6},
    )


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 1.0], 10) == "█▁"
    assert sparkline([2.0, 2.0], 10) == "▁▁"


def test_sparkline_averages_what_does_not_fit() -> None:
    """Columns of 0, 0 / 7, 7 / 3, 4: means 0, 7 and 3.5, the last halfway up (3.5 rounds to the even 4)."""
    assert sparkline([0, 0, 7, 7, 3, 4], 3) == "▁█▅"


@pytest.mark.parametrize(("values", "width"), [([], 5), ([float("nan")], 5), ([1.0], 0)])
def test_sparkline_of_nothing(values: list[float], width: int) -> None:
    assert sparkline(values, width) == ""


def test_what_is_not_finite_is_left_out_of_the_curve() -> None:
    assert sparkline([0.0, float("nan"), 1.0, float("inf")], 9) == "▁█"


def test_the_bar_is_read_without_colours() -> None:
    assert progress_bar(3, 12, 8).plain == "━━──────"
    assert progress_bar(12, 12, 8).plain == "━" * 8
    assert progress_bar(11, 12, 8).plain == "━━━━━━━─"  # full only at the end
    assert progress_bar(0, 0, 4, ascii_only=True).plain == "----"


def test_a_wide_panel_shows_everything(status: Status) -> None:
    text = drawn(status, 100)
    for words in (
        "dpo",
        "step 12/20",
        "0:01:23",
        "left 0:00:55",
        "━",
        "1,234 tokens/s  memory 1.50 GiB  adapter lr 3.00e-05  opened lr 5.00e-06",
    ):
        assert words in text
    # Of the loss's 0.58 to 0.69, 0.65 lies 4.5 sevenths up and 0.62 lies 2.5.
    rows = {line.strip("│ ").split()[0]: line for line in text.splitlines()[2:-1]}
    assert rows["loss"].split()[2:6] == ["0.5800", "eval", "0.5962", "█▅▄▁"]
    assert rows["margin"].split()[2:6] == ["0.3000", "eval", "0.2203", "▁▃▆█"]
    assert rows["accuracy"].split()[2:4] == ["1.0000", "▁▅██"]
    assert "health" not in text


@pytest.mark.parametrize("width", [24, 34, 44, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(status: Status, width: int) -> None:
    status.health = ["likelihood-displacement", "gradient-spike"]
    text = drawn(status, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    flat = text.replace("│", " ")
    for words in ("likelihood-displacement", "gradient-spike", "tokens/s", "5.00e-06"):
        assert words in "".join(flat.split()), words  # cut where the width is, but all there
    for figure in ("0.5800", "0.3000", "1.0000"):
        assert figure in flat
    if width >= 60:
        assert "eval   0.5962" in flat
        assert "left 0:00:55" in flat


def test_an_evaluation_is_named_while_it_runs(status: Status) -> None:
    status.doing = "evaluating"
    assert "evaluating" in drawn(status, 80)
    assert "left" not in drawn(status, 80)


def test_a_terminal_without_unicode_gets_figures_and_no_bars(status: Status) -> None:
    text = drawn(status, 80, encoding="ascii")
    assert "0.5800" in text
    assert text.isascii()
