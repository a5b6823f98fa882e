"""The screen while a stage trains: the live panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.live import Live
from transformers import TrainerCallback

from pipeline.training.watch.health import Finding
from pipeline.training.watch.panel import LABELS, Status

_PLAIN_INTERVAL = 15.0
"""Seconds between lines where the output is not a terminal."""
_SPEED_WINDOW = 10
"""Logged steps that the speed is averaged over."""


class Screen(TrainerCallback):  # type: ignore[misc]
    """Shows how training goes.

    Args:
        console: where.
        stage: `sft` or `dpo`.
        opened_ratio: the learning rate of the opened weights over the adapter's, if any are opened.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        console: Console,
        stage: str,
        opened_ratio: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._opened_ratio = opened_ratio
        self._clock = clock
        self._live: Live | None = None
        self._status = Status(stage)
        self._began = self._said = 0.0
        self._first_step = 0
        self._first_step_began: float | None = None
        self._step_began = 0.0
        self._stepping = 0.0
        """Seconds spent in optimizer steps, evaluations and checkpoints not counted."""
        self._seen: deque[tuple[float, float]] = deque(maxlen=_SPEED_WINDOW + 1)
        """At each logged step: `_stepping`, and the tokens trained on so far."""

    def found(self, finding: Finding) -> None:
        """Tells a health finding, and keeps its code in view."""
        self._status.health.append(finding.code)
        told = f"health: {finding.code} at step {finding.step}: {finding.message}\n  {finding.mend}"
        # Cut at words where the width is a person's; a mend may have brackets of its own.
        self._console.print(told, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the panel."""
        self._began = self._said = self._clock()
        self._first_step = state.global_step
        self._status.step, self._status.steps = state.global_step, state.max_steps
        if state.global_step == 0:
            self._seen.append((0.0, 0.0))
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._now, console=self._console, refresh_per_second=2)
            self._live.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the watch of a step."""
        self._step_began = self._clock()
        if self._first_step_began is None:  # an evaluation before the first step says nothing of the time left
            self._first_step_began = self._step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes the figures to show."""
        logs = logs or {}
        status, evaluated = self._status, "eval_loss" in logs
        figures = {}
        for name in LABELS:
            value = logs.get(f"eval_{name}" if evaluated else name)
            if isinstance(value, float) and (name != "mean_token_accuracy" or status.stage == "sft"):
                figures[name] = value
        if evaluated:
            status.held_out = figures
        else:
            for name, value in figures.items():
                status.curves.setdefault(name, []).append(value)
        if "learning_rate" in logs:
            rate = logs["learning_rate"]
            opened = {} if self._opened_ratio is None else {"opened": rate * self._opened_ratio}
            status.learning_rates = {"adapter": rate, **opened}
        if "num_tokens" in logs:
            self._seen.append((self._stepping, logs["num_tokens"]))
            seconds, tokens = (new - old for new, old in zip(self._seen[-1], self._seen[0], strict=True))
            status.tokens_per_second = tokens / seconds if seconds > 0 else None
        status.memory = memory_in_use(args.device)
        words = "  ".join(f"{LABELS[name]} {value:.3f}" for name, value in figures.items())
        if evaluated:
            self._line(state, f"evaluated: {words}")
        elif figures and self._is_time():
            self._line(state, f"{words}  {self._left()}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says that an evaluation is what takes the time."""
        self._status.doing = "evaluating"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The evaluation is over."""
        self._status.doing = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar; where this step's figures are still to come, they get the line."""
        moment = self._clock()
        self._stepping += moment - self._step_began
        status = self._status
        status.step = state.global_step
        assert self._first_step_began is not None, "a step ends after it began"
        done, to_do = status.step - self._first_step, status.steps - status.step
        status.left = (moment - self._first_step_began) / done * to_do
        if not control.should_log and self._is_time():
            self._line(state, self._left())

    def _now(self) -> Status:
        self._status.elapsed = self._clock() - self._began
        return self._status

    def close(self) -> None:
        """Leaves the panel as it last was; called however training ended."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_time(self) -> bool:
        return self._clock() - self._said >= _PLAIN_INTERVAL or self._status.step >= self._status.steps

    def _left(self) -> str:
        return "" if self._status.left is None else f"{self._status.left:.0f} s left"

    def _line(self, state: Any, words: str) -> None:
        if self._live is None:
            self._said = self._clock()
            step = f"{self._status.stage} step {state.global_step}/{state.max_steps}"
            self._console.print(f"{step}  {words}", highlight=False)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors have taken so far on a GPU; what the process holds now elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
