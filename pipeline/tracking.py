"""Where a run's figures go beside its folder: Weights & Biases, and TensorBoard where it is asked for.

W&B is kept at arm's length: it mirrors `metrics.jsonl`, and never blocks or ends a run. Whatever goes wrong in it is
said once, and the run goes on without it. The resolved experiment and the manifest
are handed over; what W&B would gather by itself (environment, code, git remotes, console) stays here.

W&B is spoken to from threads of its own, so that a service that is slow, stopped or killed holds up no training step:
at the start it may take `_START_TIMEOUT` seconds, and as long again offline, at the end `_FINISH_TIMEOUT`, in between
nothing.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.experiment import Tracking, Wandb
from pipeline.redaction import hide

_INIT_TIMEOUT = 30.0
"""Seconds that W&B may take to answer before the run is kept offline."""
_START_TIMEOUT = 45.0
"""Seconds that it may take whatever it does: W&B itself waits for its own process for ever, should that be stopped."""
_FINISH_TIMEOUT = 60.0
"""Seconds that W&B may take at the end to send what it has not sent yet."""
_WAITING = 100_000
"""Calls that may wait for W&B before it is given up."""


def choose_mode(mode: str) -> str:
    """`online`, `offline` or `disabled`; `auto` is what W&B is set to, and offline where it finds no key."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return asked
    return _mode_of_wandb()


def _mode_of_wandb() -> str:
    """What W&B would do by itself, without asking anybody: its own code knows where keys and settings may stand.

    As W&B 0.31 has it: a variable of the environment, a netrc under the host's name or the one behind it, a file of
    settings (`wandb offline`, `wandb disabled`).
    """
    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        settings = wandb_setup.singleton().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return "disabled" if settings.mode == "disabled" else "offline"
        key = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    except Exception as error:
        # Of a key that is none, `wandb.init` says so. Anything else: a W&B that keeps this elsewhere.
        found = type(error).__name__ == "AuthenticationError" or "WANDB_API_KEY" in os.environ
    else:
        found = key is not None
    return "online" if found else "offline"


class Tracker:
    """One W&B run beside one run folder; a tracker that failed to start, or is disabled, does nothing."""

    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        self._run = run
        self._say = say
        self._todo: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_WAITING)
        self._worker: threading.Thread | None = None
        self.gave_up = False
        """Whether W&B was left out on the way."""

    @property
    def id(self) -> str | None:
        """W&B's id of the run."""
        return None if self._run is None else str(self._run.id)

    def describe(self) -> dict[str, Any] | None:
        """For the manifest."""
        if self._run is None:
            return None
        mode = "offline" if self._run.settings.mode in ("offline", "dryrun") else "online"
        return {"id": self.id, "mode": mode, "project": self._run.project, "group": self._run.group}

    def give_up(self, cause: str) -> None:
        """Goes on without W&B, and says so once."""
        if self._run is not None:
            self._run, self.gave_up = None, True
            kept = "metrics.jsonl holds everything, and `pipeline wandb-sync RUN` sends it later"
            self._say(f"W&B {cause}; the run goes on, {kept}")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of one logged step, under the names they have in `metrics.jsonl`."""
        self._guarded(lambda run: run.log(metrics, step=step))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """How some values of one evaluation are spread."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Histogram(list(values))}, step=step)

        self._guarded(send)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table of one evaluation."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=columns, data=rows)}, step=step)

        self._guarded(send)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Hands over the manifest and ends the W&B run with its status."""

        def end(run: Any) -> None:
            run.config.update({"manifest": manifest}, allow_val_change=True)
            run.finish(exit_code=0 if manifest["status"] == "finished" else 1)

        self._guarded(end)
        if self._worker is not None:
            self._todo.put(None)
            self._worker.join(_FINISH_TIMEOUT)
            if self._worker.is_alive():
                self.give_up(f"did not answer within {_FINISH_TIMEOUT:.0f} s")
            if self._run is None:
                _end_service()
        self._run = None

    def _guarded(self, act: Callable[[Any], None]) -> None:
        """Has `act` done with the W&B run, behind what was asked before; the caller does not wait."""
        if self._run is None:
            return
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, args=(self._run,), name="W&B", daemon=True)
            self._worker.start()
        try:
            self._todo.put_nowait(act)
        except queue.Full:
            self.give_up("does not keep up")

    def _work(self, run: Any) -> None:
        while (act := self._todo.get()) is not None:
            if self._run is None:
                continue  # given up
            try:
                act(run)
            except Exception as error:
                self.give_up(f"stopped ({type(error).__name__})")


def _started(init: Callable[[], Any]) -> Any:
    """What `init` returns, if it does within `_START_TIMEOUT`; else W&B's process is ended, so that another can begin.

    Raises:
        TimeoutError: it did not.
        Exception: what `init` raised.
    """
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(init())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="W&B's start", daemon=True).start()
    try:
        return answer.result(_START_TIMEOUT)
    except TimeoutError as error:
        if answer.done():
            raise
        _end_service()
        raise TimeoutError(f"no answer within {_START_TIMEOUT:g} s") from error


def _end_service() -> None:
    """Ends W&B's own process, a child of this one: it would hold up the end of this one as well, or spoil it."""
    import psutil
    import wandb

    with suppress(Exception, SystemExit):  # W&B leaves Python with the status of its process, were it killed
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core"):
                child.kill()
        wandb.teardown(1)


class TensorBoard:
    """Event files of one run, for `tensorboard --logdir`.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """The figures of one logged step, under the names they have in `metrics.jsonl`."""
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """How some values of one evaluation are spread."""
        import numpy as np

        self._writer.add_histogram(name, np.asarray(values), step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table of one evaluation, as text."""
        texts = ["\n".join(f"{column}: {cell}" for column, cell in zip(columns, row, strict=True)) for row in rows]
        # Indented by four, text is taken literally by TensorBoard, whatever the model wrote.
        self._writer.add_text(name, "\n\n---\n\n".join("    " + text.replace("\n", "\n    ") for text in texts), step)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes what is still in memory."""
        self._writer.close()


class Mirrors:
    """Every place that a run's figures go to."""

    def __init__(self, *mirrors: Tracker | TensorBoard) -> None:
        self._mirrors = mirrors

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of one logged step, under the names they have in `metrics.jsonl`."""
        for mirror in self._mirrors:
            mirror.log(step, metrics)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """How some values of one evaluation are spread."""
        for mirror in self._mirrors:
            mirror.histogram(step, name, values)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table of one evaluation: names of the columns, and rows of plain values."""
        for mirror in self._mirrors:
            mirror.table(step, name, columns, rows)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Ends them all, with the run's last manifest."""
        for mirror in self._mirrors:
            mirror.finish(manifest)


def require_tracking(settings: Tracking) -> None:
    """What is asked for has to be installed.

    Raises:
        PipelineError: TensorBoard is asked for, and is not.
    """
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise PipelineError(
            "`tracking.tensorboard` needs TensorBoard, which is not installed",
            code="missing-package",
            pointer="/tracking/tensorboard",
            mend='pip install tensorboard, or "preference-pipeline[tensorboard]"',
        )


def start_tracker(
    settings: Wandb,
    *,
    experiment: str,
    name: str,
    stage: str,
    folder: Path,
    config: dict[str, Any],
    say: Callable[[str], None],
    earlier: dict[str, Any] | None = None,
    step: int = 0,
) -> Tracker:
    """A tracker for a run.

    Args:
        settings: the experiment's `tracking.wandb`.
        experiment: its name: the project where none is given, and the group that SFT and DPO share.
        name: the run's name, `sft-001`.
        stage: `sft` or `dpo`, W&B's job type.
        folder: the run folder; W&B's files go to `wandb/` in it.
        config: the resolved experiment and the manifest so far.
        say: tells the user one line.
        earlier: what `describe` said before the run was stopped: an online run is continued under its id. One that was
            offline is not: W&B would take its second part for a new beginning, and forget the first. The new W&B run
            says what it goes on with: `resumed_from` in its configuration, and the tag `resumed`.
        step: where a resumed run goes on.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = choose_mode(settings.mode)
    if mode == "disabled":
        return Tracker(None, say)
    try:
        import wandb

        continued = earlier["id"] if earlier and earlier["mode"] == "online" else None

        def init(mode: str) -> Any:
            same = continued is not None and mode == "online"
            anew = earlier is not None and not same
            return wandb.init(
                project=settings.project or experiment,
                entity=settings.entity,
                group=experiment,
                job_type=stage,
                name=name,
                dir=folder,
                mode=mode,  # type: ignore[arg-type]
                id=continued if same else None,
                resume="allow" if same else None,
                config={**config, "resumed_from": {"id": earlier["id"], "step": step}} if earlier and anew else config,
                tags=["resumed"] if anew else None,
                save_code=False,
                reinit="create_new",
                settings=wandb.Settings(
                    init_timeout=_INIT_TIMEOUT,
                    finish_timeout=_FINISH_TIMEOUT,
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_git=True,
                    x_disable_meta=True,
                    x_disable_machine_info=True,
                ),
            )

        try:
            run = _started(lambda: init(mode))
        except Exception as error:
            if mode == "offline":
                raise
            say(f"W&B cannot be reached ({type(error).__name__}); the run is tracked offline")
            run = _started(lambda: init("offline"))
    except Exception as error:
        say(f"W&B is left out ({type(error).__name__}: {hide(str(error))}); metrics.jsonl holds everything")
        return Tracker(None, say)
    return Tracker(run, say)
