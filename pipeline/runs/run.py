"""One run: its folder `checkpoints/<experiment>/<stage>-001` and the manifest `run.json` in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ExitCode, PipelineError
from pipeline.runs.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, fingerprint, write_atomically, write_json
from pipeline.runs.lock import LOCK

Stage = Literal["sft", "dpo"]
Status = Literal["running", "finished", "failed", "interrupted"]
MANIFEST = "run.json"
DEFAULT_ROOT = Path("checkpoints")
_OWN = ("state", "adapter", "metrics.jsonl", "experiment.yaml", MANIFEST, LOCK)
"""What is written into a run that is gone on with."""
_LISTED = ("experiment.yaml", "metrics.jsonl", "proof.json", "set-aside.jsonl", "adapter/**/*")
_FOLDER = re.compile(r"^(sft|dpo)-(\d{3,})$")


@dataclass
class Run:
    """A run folder and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """`<experiment>/<stage>-001`."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def stage(self) -> str:
        """`sft` or `dpo`."""
        return str(self.manifest["stage"])

    @property
    def number(self) -> int:
        """Counted from 1 within its stage; clocks jump, numbers do not. 0 for a folder of another name."""
        match = _FOLDER.match(self.path.name)
        return int(match[2]) if match else 0

    @property
    def status(self) -> str:
        """`running`, `finished`, `failed` or `interrupted`."""
        return str(self.manifest["status"])

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.path / "adapter"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    def update(self, **fields: Any) -> None:
        """Writes the manifest with some fields set; what cannot be written is not set either."""
        write_json(self.path / MANIFEST, {**self.manifest, **fields})
        self.manifest.update(fields)

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file that a finished run is judged by, by its path in the run folder."""
        return {
            path.relative_to(self.path).as_posix(): fingerprint(path)
            for pattern in _LISTED
            for path in sorted(self.path.glob(pattern))
            if path.is_file()
        }

    def end(self, status: Status, **fields: Any) -> None:
        """Closes the run with its last status."""
        self.update(status=status, end=now(), **fields)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def create_run(root: Path, experiment: str, stage: Stage, resolved: str, manifest: dict[str, Any]) -> Run:
    """A new run folder under `root`, numbered after the highest there; never one that exists.

    Args:
        root: usually `checkpoints`.
        experiment: its name.
        stage: `sft` or `dpo`.
        resolved: the resolved experiment as YAML, written to `experiment.yaml`.
        manifest: what is known at the start; `stage`, `status`, `start` are added.

    Raises:
        PipelineError: the folder cannot be written.
    """
    parent = root / experiment
    require_inside(root, parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [
                int(match[2])
                for entry in parent.iterdir()
                if (match := _FOLDER.match(entry.name)) and match[1] == stage
            ]
            path = parent / f"{stage}-{max(taken, default=0) + 1:03d}"
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue  # another process was faster: take the next number
        run = Run(path, {"stage": stage, "status": "running", "experiment": experiment, "start": now(), "end": None})
        run.update(**manifest)
        write_atomically(path / "experiment.yaml", resolved)
    except OSError as error:
        raise PipelineError(
            f"the run folder cannot be written: {error.strerror or error}",
            code="cannot-write",
            file=error.filename or parent,
            mend="name a folder that can be written with --checkpoints, or free some space",
            exit_code=ExitCode.MACHINE,
        ) from error
    return run


def is_run_name(name: str) -> bool:
    """Whether `name` ends as a run's does: in `sft-001` or the like."""
    return _FOLDER.match(Path(name).name) is not None


def require_inside(root: Path, path: Path) -> None:
    """No link leads a run, or a file that is written into it, out of the folder of runs.

    Raises:
        PipelineError: `path`, or one of a run's own files in it, is such a link.
    """
    for one in (path, *(path / name for name in _OWN)):
        if one.is_symlink() and not one.resolve().is_relative_to(root.resolve()):
            raise PipelineError(
                f"a symbolic link leads out of {root}, to {one.resolve()}",
                code="outside",
                file=one,
                mend="remove the link; another disk can be named with --checkpoints",
            )


def read_run(path: Path) -> Run:
    """The run in `path`.

    Raises:
        PipelineError: there is no run there, or its manifest is damaged.
    """
    manifest = path / MANIFEST
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PipelineError(
            f"{path} is no run: it holds no {MANIFEST}",
            code="no-such-run",
            mend="`pipeline runs` lists the runs",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(
            f"the manifest cannot be read: {error}", code="damaged-run", file=manifest, mend="use another run"
        ) from error
    if not isinstance(value, dict) or not {"stage", "status"} <= value.keys():
        raise PipelineError(
            "the manifest is no JSON object with stage and status",
            code="damaged-run",
            file=manifest,
            mend="use another run",
        )
    return Run(path, value)


def list_runs(root: Path, experiment: str | None = None) -> list[Run]:
    """All readable runs under `root`, by experiment, then in the order they were started."""
    runs = []
    for manifest in sorted(root.glob(f"{experiment or '*'}/*/{MANIFEST}")):
        if _FOLDER.match(manifest.parent.name):
            try:
                runs.append(read_run(manifest.parent))
            except PipelineError:
                continue
    return sorted(runs, key=lambda run: (run.path.parent.name, str(run.manifest.get("start") or ""), run.path.name))


def newest_finished(root: Path, experiment: str, stage: Stage) -> Run:
    """The newest finished run of a stage.

    Raises:
        PipelineError: there is none; says which there are.
    """
    runs = [run for run in list_runs(root, experiment) if run.stage == stage]
    finished = [run for run in runs if run.status == "finished"]
    if not finished:
        seen = ", ".join(f"{run.path.name} is {run.status}" for run in runs) or "none was started"
        raise PipelineError(
            f"experiment `{experiment}` has no finished {stage.upper()} run under {root} ({seen})",
            code="no-finished-run",
            file=root / experiment,
            mend=f"run `pipeline {stage} EXPERIMENT` first, or name a run or adapter folder with --from",
        )
    return finished[-1]


def find_run(root: Path, name: str) -> Run | Path:
    """The run, or foreign adapter folder, that a user names.

    Args:
        root: where runs live.
        name: a folder (a run or a PEFT adapter), or `<experiment>/<stage>-001` under `root`.

    Raises:
        PipelineError: it is neither.
    """
    for candidate in (Path(name), root / name):
        if (candidate / MANIFEST).is_file():
            return read_run(candidate)
        # PEFT saves an adapter that is not called `default` in a folder of its name.
        inside = [] if _FOLDER.match(candidate.name) else candidate.glob("*/")
        holders = [one for one in (candidate, *inside) if _holds_adapter(one)]
        if candidate in holders or len(holders) == 1:
            return holders[0]
        if holders:
            raise PipelineError(
                f"{candidate} holds several adapters: {', '.join(sorted(one.name for one in holders))}",
                code="no-such-run",
                mend=f"name one of them: {holders[0]}",
            )
    raise PipelineError(
        f"`{name}` is neither a run nor a folder with a PEFT adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})",
        code="no-such-run",
        mend="`pipeline runs` lists the runs; a run can be named by its folder",
    )


def _holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def require_run(found: Run | Path) -> Run:
    """`found`, if it is a run of ours.

    Raises:
        PipelineError: it is a foreign adapter, which keeps no record.
    """
    if isinstance(found, Run):
        return found
    raise PipelineError(
        f"{found} is an adapter folder without a record of its run",
        code="no-such-run",
        file=found,
        mend="`pipeline runs` lists the runs",
    )
