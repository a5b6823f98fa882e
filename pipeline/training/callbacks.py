"""What happens beside TRL's training loop: the record of each logged step, the screen, the guards."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from pipeline.errors import ExitCode, PipelineError
from pipeline.tracking import Tracker

_PLAIN_INTERVAL = 15.0
"""Seconds between lines where the output is not a terminal."""


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step to `metrics.jsonl` and mirrors it to W&B.

    Args:
        file: `metrics.jsonl` of the run.
        tracker: W&B.
        opened_ratio: the learning rate of the opened weights over the adapter's, if any are opened; theirs is then
            logged as `learning_rate/opened`. One schedule scales both.
    """

    def __init__(self, file: Path, tracker: Tracker, opened_ratio: float | None) -> None:
        self._file = file
        self._tracker = tracker
        self._opened_ratio = opened_ratio
        self.last: dict[str, Any] = {}
        """The newest value of every metric."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Records one logged step."""
        if not logs or not state.is_world_process_zero:
            return
        metrics = dict(logs)
        if self._opened_ratio is not None and "learning_rate" in metrics:
            metrics["learning_rate/opened"] = metrics["learning_rate"] * self._opened_ratio
        # JSON has no NaN; the guard ends the run on one, and the record says at which step.
        metrics = {key: None if _not_finite(value) else value for key, value in metrics.items()}
        self.last.update(metrics)
        line = json.dumps({"step": state.global_step, **metrics}, allow_nan=False)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        self._tracker.log(state.global_step, metrics)


class Guard(TrainerCallback):  # type: ignore[misc]
    """Stops the run on NaN, and at the end of the step after SIGINT or SIGTERM, with a checkpoint."""

    def __init__(self) -> None:
        self.failure: PipelineError | None = None
        self.interrupted = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at loss and gradient norm."""
        for key in ("loss", "grad_norm", "eval_loss"):
            if _not_finite((logs or {}).get(key)) and self.failure is None:
                self.failure = PipelineError(
                    f"{key} is not finite at step {state.global_step}",
                    code="not-finite",
                    mend="lower the learning rate, or use `model.dtype: float32`; metrics.jsonl shows how it came",
                    exit_code=ExitCode.WRONG,
                )
                control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves and stops if a signal came during the step."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the first SIGINT or SIGTERM is noted; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Screen(TrainerCallback):  # type: ignore[misc]
    """Progress with time left, loss and reward margin: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, stage: str) -> None:
        self._console = console
        self._stage = stage
        self._bar: Progress | None = None
        self._task: Any = None
        self._began = 0.0
        self._said = 0.0
        self._figures = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the bar."""
        self._began = self._said = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=state.max_steps, figures="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remembers the figures to show."""
        names = {
            "loss": "loss",
            "rewards/margins": "margin",
            "rewards/accuracies": "accuracy",
            "eval_loss": "eval loss",
        }
        logs = logs or {}
        shown = [f"{word} {logs[key]:.3f}" for key, word in names.items() if isinstance(logs.get(key), float)]
        if shown:
            self._figures = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, figures=self._figures)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar, or prints a line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
            return
        moment = time.monotonic()
        if moment - self._said >= _PLAIN_INTERVAL or state.global_step >= state.max_steps:
            self._said = moment
            left = (moment - self._began) / state.global_step * (state.max_steps - state.global_step)
            self._console.print(
                f"{self._stage} step {state.global_step}/{state.max_steps}  {self._figures}  {left:.0f} s left",
                highlight=False,
            )

    def close(self) -> None:
        """Takes the bar away; called however training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
