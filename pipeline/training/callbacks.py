"""What happens beside TRL's training loop: the record of each logged step, the guards."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from pipeline.errors import ExitCode, PipelineError
from pipeline.tracking import Mirrors

_ROWS_SHOWN = 16


_TIMING = ("_runtime", "_per_second")
"""Ends of the names of figures that differ from one machine, or one hour, to the next."""


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step to `metrics.jsonl` and mirrors it.

    Two runs of the same experiment on the same machine write the same bytes: times and speeds are not among them,
    they go to W&B and, the newest of each, to the manifest.

    Args:
        file: `metrics.jsonl` of the run.
        tracker: W&B, and TensorBoard where it is asked for.
        opened_ratio: the learning rate of the opened weights over the adapter's, if any are opened; theirs is then
            logged as `learning_rate/opened`. One schedule scales both.
    """

    def __init__(self, file: Path, tracker: Mirrors, opened_ratio: float | None) -> None:
        self._file = file
        self._tracker = tracker
        self._opened_ratio = opened_ratio
        self.last: dict[str, Any] = {}
        """The newest value of every metric."""
        self._written = hashlib.sha256()
        self._bytes = 0
        self._seconds_before = 0.0
        self._began = time.monotonic()

    def position(self) -> dict[str, Any]:
        """How far the record has come, for a checkpoint; what was written is on the disk afterwards."""
        if self._bytes:
            with self._file.open("rb") as stream:
                os.fsync(stream.fileno())
        return {
            "bytes": self._bytes,
            "sha256": self._written.hexdigest(),
            "last": self.last,
            "seconds": self._seconds(),
        }

    def go_back(self, position: dict[str, Any]) -> None:
        """Cuts the record to what it was at a checkpoint: the resumed run logs the steps behind it again."""
        if self._file.exists():
            os.truncate(self._file, position["bytes"])
            self._written = hashlib.sha256(self._file.read_bytes())
        self._bytes = position["bytes"]
        self.last = dict(position["last"])
        self._seconds_before = position["seconds"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock: a monotonic one, which nobody sets back."""
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Records one logged step."""
        if not logs or not state.is_world_process_zero:
            return
        metrics = dict(logs)
        if self._opened_ratio is not None and "learning_rate" in metrics:
            metrics["learning_rate/opened"] = metrics["learning_rate"] * self._opened_ratio
        if metrics.get("train_runtime"):  # below zero where the clock was set back
            self._whole_time(metrics)
        # JSON has no NaN; the guard ends the run on one, and the record says at which step.
        metrics = {key: None if _not_finite(value) else value for key, value in metrics.items()}
        self.last.update(metrics)
        lasting = {key: value for key, value in metrics.items() if not key.endswith(_TIMING)}
        line = (json.dumps({"step": state.global_step, **lasting}, allow_nan=False) + "\n").encode()
        with self._file.open("ab") as stream:
            stream.write(line)
        self._written.update(line)
        self._bytes += len(line)
        self._tracker.log(state.global_step, metrics)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _whole_time(self, metrics: dict[str, Any]) -> None:
        """Trainer's times are of this process alone; a resumed run has trained before."""
        ratio = metrics["train_runtime"] / self._seconds()
        metrics["train_runtime"] = round(self._seconds(), 4)
        for key in ("train_samples_per_second", "train_steps_per_second"):
            if key in metrics:
                metrics[key] = round(metrics[key] * ratio, 3)


class Guard(TrainerCallback):  # type: ignore[misc]
    """Stops the run on NaN, and after SIGINT, SIGTERM or SIGUSR1 at the end of the step, with a checkpoint."""

    def __init__(self) -> None:
        self.failure: PipelineError | None = None
        self.interrupted = False
        """Whether the run is to stop: this process, or one that it trains with, has had a signal."""
        self._not_finite: str | None = None
        self._rows: list[str] = []

    @property
    def not_finite(self) -> str | None:
        """The figure of the running step that is NaN or infinite; None where none is."""
        return self._not_finite

    def note_not_finite(self, figure: str, rows: list[str]) -> None:
        """A figure of the running step is NaN or infinite.

        Args:
            figure: its name.
            rows: where the step's rows are, `file:line`.
        """
        if self._not_finite is None:
            self._not_finite, self._rows = figure, rows

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at the losses; a gradient that overflows is loss scaling's daily bread in float16."""
        for key in ("loss", "eval_loss") if args.fp16 else ("loss", "grad_norm", "eval_loss"):
            if _not_finite((logs or {}).get(key)):
                self.fail(self._not_finite or key, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves and stops if a signal came during the step; logs and stops if a figure was not finite."""
        if self._not_finite is not None:
            control.should_log = True
            control.should_save = control.should_evaluate = False
            self.fail(self._not_finite, state, control)
        elif self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def fail(self, figure: str, state: Any, control: Any) -> None:
        """Ends the run at this step, for a figure that is not finite."""
        control.should_training_stop = True
        if self.failure is not None:
            return
        rows = f", which trained on {_some(self._rows)}" if self._rows else ""
        self.failure = PipelineError(
            f"{figure} is not finite at step {state.global_step}{rows}",
            code="not-finite",
            mend="look at those rows, lower the learning rate, or use `model.dtype: float32`; metrics.jsonl shows how "
            "it came; the checkpoint before it is kept: `--resume --accept-changes` goes on from there",
            exit_code=ExitCode.WRONG,
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the first SIGINT, SIGTERM or SIGUSR1 (SLURM's warning) is noted; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        heard = False

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal heard
            if heard:
                raise KeyboardInterrupt
            heard = self.interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _some(rows: list[str]) -> str:
    shown = ", ".join(rows[:_ROWS_SHOWN])
    return shown + (f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else "")
