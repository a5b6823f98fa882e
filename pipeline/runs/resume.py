"""Which run `--resume` goes on with, from which checkpoint, and what must not have changed since."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment import Experiment
from pipeline.runs.checkpoints import Checkpoint, find_checkpoint
from pipeline.runs.lock import unwritten
from pipeline.runs.run import Run, Stage, find_run, list_runs, require_inside, require_run

COMPARED = ("data", "base", "tokenizer", "versions", "placement")
"""Parts of the manifest that must be what they were; `resumed` notes what was accepted."""
_LIBRARIES = ("python", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "numpy")
_NOT_TRAINED_ON = ("name", "evaluation", "tracking", "model.id", "model.revision")
"""Keys of the experiment that do not touch training, or are compared by what they lead to."""


@dataclass(frozen=True)
class Resume:
    """What `--resume` asks for.

    Attributes:
        run: the run's name or folder; None: the newest unfinished one.
        accept_changes: whether to go on where something has changed.
    """

    run: str | None = None
    accept_changes: bool = False


@dataclass(frozen=True)
class Resumption:
    """A run that is gone on with."""

    run: Run
    checkpoint: Checkpoint
    passed_over: list[tuple[str, str]]
    accept_changes: bool


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the run was started."""

    what: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


def find_resumption(
    root: Path, experiment: str, stage: Stage, resume: Resume | None, say: Callable[[str], None]
) -> Resumption | None:
    """The run to go on with and its newest whole checkpoint; says which, and why newer ones were passed over.

    Args:
        root: where runs live.
        experiment: its name.
        stage: which of its stages.
        resume: what is asked for; None: nothing, so None is found.
        say: tells the user one line.

    Raises:
        PipelineError: there is no unfinished run, it left no whole checkpoint, or another process writes to it.
    """
    if resume is None:
        return None
    run = _named(root, experiment, stage, resume.run) if resume.run is not None else _newest(root, experiment, stage)
    require_inside(root, run.path.parent)
    require_inside(root, run.path)
    with unwritten(run.path):  # reading a run that is being written would find what is gone a moment later
        search = find_checkpoint(run.path / "state", run.metrics_file)
    for name, reason in search.passed_over:
        say(f"{name} is passed over: {reason}")
    if search.checkpoint is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in search.passed_over)
        raise PipelineError(
            f"{run.name} left no checkpoint that is whole ({why or 'it was stopped before the first one'})",
            code="no-checkpoint",
            file=run.path,
            mend=f"start again from step 0: `pipeline {stage}` without --resume",
        )
    say(f"resumed: {run.path} at step {search.checkpoint.step}")
    return Resumption(run, search.checkpoint, search.passed_over, resume.accept_changes)


def unfinished(root: Path, experiment: str, stage: Stage) -> Run | None:
    """The newest run of a stage, if it did not finish."""
    runs = [run for run in list_runs(root, experiment) if run.stage == stage]
    newest = max(runs, key=lambda run: run.number, default=None)
    return newest if newest is not None and newest.status != "finished" else None


def changes_since(run: Run, then: Experiment, now: Experiment, manifest: dict[str, Any]) -> list[Change]:
    """What differs between a run and what would be gone on with.

    Args:
        run: as it was started, or last resumed.
        then: its resolved experiment.
        now: the experiment of today.
        manifest: what a new run of today would note.
    """
    before = run.manifest
    changes = experiment_changes(then, now, run.stage)
    changes += data_changes(before.get("data", []), manifest["data"])
    for what, part, key in (
        ("base weights", "base", "sha256"),
        ("quantisation", "base", "quantize"),
        ("chat template", "tokenizer", "template_sha256"),
        ("device", "placement", "device"),
        ("precision", "placement", "dtype"),
        ("processes (world size)", "placement", "world_size"),
    ):
        old, new = before.get(part, {}).get(key), manifest[part][key]
        if old != new:
            changes.append(Change(what, old, new))
    for library in _LIBRARIES:
        old, new = before.get("versions", {}).get(library), manifest["versions"][library]
        if old != new:
            changes.append(Change(f"version of {library}", old, new))
    return changes


def require_unchanged(run: Run, changes: list[Change], *, accepted: bool) -> None:
    """A run that goes on must be the run that began, unless its user says otherwise.

    Raises:
        PipelineErrors: something changed and was not accepted; one error for each change.
    """
    if changes and not accepted:
        raise PipelineErrors(
            [
                PipelineError(
                    f"changed since {run.name} was started: {change}",
                    code="changed-since",
                    file=run.path,
                    mend="put it back; or add --accept-changes, which the manifest will say",
                )
                for change in changes
            ]
        )


def _named(root: Path, experiment: str, stage: Stage, name: str) -> Run:
    run = require_run(find_run(root, name if "/" in name or Path(name).is_dir() else f"{experiment}/{name}"))
    if run.stage != stage or run.manifest.get("experiment", experiment) != experiment:
        raise PipelineError(
            f"{run.name} is no {stage.upper()} run of the experiment `{experiment}`",
            code="other-run",
            file=run.path,
            mend="`pipeline runs` lists the runs",
        )
    if run.status == "finished":
        raise _nothing_left(run)
    return run


def _newest(root: Path, experiment: str, stage: Stage) -> Run:
    run = unfinished(root, experiment, stage)
    if run is not None:
        return run
    runs = [run for run in list_runs(root, experiment) if run.stage == stage]
    if runs:
        raise _nothing_left(max(runs, key=lambda run: run.number))
    raise PipelineError(
        f"there is no {stage.upper()} run of `{experiment}` under {root} to resume",
        code="nothing-to-resume",
        mend="start one: the same command without --resume",
    )


def _nothing_left(run: Run) -> PipelineError:
    return PipelineError(
        f"{run.name} is finished, so there is nothing to resume",
        code="nothing-to-resume",
        file=run.path,
        mend="name an unfinished run with `--resume RUN`, or start a new one without --resume",
    )


def experiment_changes(then: Experiment, now: Experiment, stage: str) -> list[Change]:
    """What a stage trains with and is not as it was; data and base are compared by their content, not their names."""
    changes = []
    other = "dpo" if stage == "sft" else "sft"
    old, new = (dict(_flat(one.model_dump(mode="json"))) for one in (then, now))
    for key in sorted(old.keys() | new.keys()):
        section = key.split(".")[0]
        is_path = re.fullmatch(r"data\.\w+\.(train|eval)", key) is not None
        if section in (other, *_NOT_TRAINED_ON) or key in _NOT_TRAINED_ON or is_path:
            continue
        if old.get(key) != new.get(key):
            changes.append(Change(f"`{key}`", old.get(key), new.get(key)))
    return changes


def data_changes(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[Change]:
    """Files that a stage trained on or was evaluated on and that are not as they were."""
    old, new = ({entry["use"]: entry for entry in entries} for entries in (then, now))
    for use in sorted(old.keys() | new.keys()):
        before, after = old.get(use), new.get(use)
        if before is None or after is None or before["sha256"] != after["sha256"]:
            shown = [
                "none" if entry is None else f"{entry['rows']:,} rows, SHA-256 {entry['sha256'][:12]}"
                for entry in (before, after)
            ]
            yield Change(f"data of {use}", *shown)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their dotted keys; an empty section is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
