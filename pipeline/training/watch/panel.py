"""The panel that a terminal shows while a stage trains: progress, curves, speed, memory, learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
LABELS = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
}
"""The metrics that have a row, by their TRL names, in the order of the rows."""
_FRAME = 4
"""Columns of the panel's border and padding."""
_FIGURES = 26
"""Columns of a row's name and value, with the gaps behind them."""
_HELD_OUT = 17
"""Columns of the figure on the held-out rows, with the gap behind it."""
_SHORTEST_CURVE = 6


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as one line of bars, at most `width` long, the lowest as `▁` and the highest as `█`.

    More values than columns are averaged, as many a column as fit evenly. What is not finite is left out.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values or width <= 0:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * at // columns for at in range(columns + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    lowest, spread = min(means), max(means) - min(means)
    if spread == 0:
        return BARS[0] * columns
    return "".join(BARS[round((mean - lowest) / spread * (len(BARS) - 1))] for mean in means)


def progress_bar(done: int, total: int, width: int, *, ascii_only: bool = False) -> Text:
    """A bar `width` long, whose done part can be told from the rest without colours as well."""
    full = min(width * done // max(total, 1), width)
    more, less = ("#", "-") if ascii_only else ("━", "─")
    return Text.assemble((more * full, "bar.complete"), (less * (width - full), "bar.back"), no_wrap=True)


@dataclass
class Status:
    """What the panel shows; it draws itself to the width that it is given."""

    stage: str
    step: int = 0
    steps: int = 0
    elapsed: float = 0.0
    """Seconds."""
    left: float | None = None
    """Seconds; None before the first step is done."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Every logged training value, by its TRL name (those in `LABELS`)."""
    held_out: dict[str, float] = field(default_factory=dict)
    """The values of the newest evaluation, by the same names."""
    tokens_per_second: float | None = None
    memory: int | None = None
    """Bytes."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """`adapter`, and `opened` where weights are opened."""
    doing: str = ""
    """What takes the time while no step is made: an evaluation."""
    health: list[str] = field(default_factory=list)
    """Codes of what was found."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - _FRAME
        parts: list[Table | Text] = [
            self._progress(width, options.ascii_only),
            *self._rows(width, bars=not options.ascii_only),
        ]
        # `no_wrap` is said, since the command's console would not wrap.
        parts += [Text(line, overflow="fold", no_wrap=False) for line in (self._speed(), self._health()) if line]
        yield Panel(Group(*parts), title=self.stage, title_align="left")

    def _progress(self, width: int, ascii_only: bool) -> Table:
        left = "" if self.left is None else f"left {_clock(self.left)}"
        words = [f"step {self.step}/{self.steps}", _clock(self.elapsed), self.doing or left]
        grid = Table.grid(padding=(0, 2, 0, 0))
        used = sum(len(word) + 2 for word in words)
        if width - used >= _SHORTEST_CURVE:
            grid.add_row(words[0], progress_bar(self.step, self.steps, width - used, ascii_only=ascii_only), *words[1:])
        else:
            grid.add_row("  ".join(word for word in words if word))
        return grid

    def _rows(self, width: int, *, bars: bool) -> list[Table]:
        with_held_out = bool(self.held_out) and width >= _FIGURES + _HELD_OUT
        room = width - _FIGURES - (_HELD_OUT if with_held_out else 0)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, label in LABELS.items():
            values = self.curves.get(name, [])
            if not values:
                continue
            held_out = self.held_out.get(name)
            grid.add_row(
                label,
                Text(f"{values[-1]:8.4f}", justify="right", no_wrap=True),
                *([f"eval {held_out:8.4f}" if held_out is not None else " " * 13] if with_held_out else []),
                *([sparkline(values, room)] if bars and room >= _SHORTEST_CURVE else []),
            )
        return [grid] if grid.row_count else []

    def _speed(self) -> str:
        words = []
        if self.tokens_per_second is not None:
            words.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.memory is not None:
            words.append(f"memory {self.memory / 2**30:.2f} GiB")
        words += [f"{group} lr {rate:.2e}" for group, rate in self.learning_rates.items()]
        return "  ".join(words)

    def _health(self) -> str:
        return f"health: {', '.join(self.health)}" if self.health else ""


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
