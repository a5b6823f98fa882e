"""`pipeline align`: SFT, DPO on its adapter, the comparison of base, SFT and DPO, and the report, in one go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.data.check import load_rows
from pipeline.errors import PipelineError
from pipeline.evaluation.harness import require_tasks
from pipeline.evaluation.results import Comparison
from pipeline.evaluation.runs import compare_runs
from pipeline.experiment import Experiment
from pipeline.experiment_file import load_experiment
from pipeline.model.device import give_memory_back
from pipeline.model.scope import Trainable
from pipeline.report.page import write_report
from pipeline.runs.resume import Resume, data_changes, experiment_changes, require_unchanged
from pipeline.runs.run import Run, list_runs, read_run
from pipeline.training.account import Outcome, split_files
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft
from pipeline.validation import require_experiment_data


def align(
    experiment: Experiment, root: Path, console: Console, *, resume: Resume | None = None
) -> tuple[list[Outcome], Comparison, Path]:
    """Both phases, their comparison and the report; every data file is proven before the first phase begins.

    Args:
        experiment: with absolute paths.
        root: where runs live.
        console: where the user is told what goes on.
        resume: goes on where it stopped: a finished phase is kept, an unfinished one resumed, and one that left no
            checkpoint begun again, which is said.

    Returns:
        The outcomes of SFT and DPO, the comparison, which is also written into the DPO run, and the report's file.

    Raises:
        PipelineError: as the stages do; what was finished before stays. Or there is nothing to go on with.
    """
    require_experiment_data(experiment)
    if experiment.evaluation.lm_eval is not None:
        require_tasks(experiment.evaluation.lm_eval)  # missed now rather than after both phases
    stopped = _Stopped(None, None) if resume is None else _find_stopped(experiment, root, resume)
    console.rule("phase one: SFT")
    sft = _phase(stopped.sft, resume, console, lambda resume: run_sft(experiment, root, console, resume=resume))
    give_memory_back()
    console.rule("phase two: DPO")
    start = str(sft.run)

    def dpo_phase(resume: Resume | None) -> Outcome:
        return run_dpo(experiment, root, console, start=None if resume else start, resume=resume)

    dpo = _phase(stopped.dpo, resume, console, dpo_phase)
    give_memory_back()
    console.rule("compare")
    runs = [read_run(outcome.run) for outcome in (sft, dpo) if outcome.run is not None]
    comparison = compare_runs(runs, experiment, root, console)
    return [sft, dpo], comparison, write_report(runs[-1:], root)


@dataclass(frozen=True)
class _Stopped:
    """The runs of an `align` that was stopped: finished, unfinished, or not begun (None)."""

    sft: Run | None
    dpo: Run | None


def _find_stopped(experiment: Experiment, root: Path, resume: Resume) -> _Stopped:
    """The newest SFT run, and the newest DPO run on it.

    Raises:
        PipelineError: there is none, all is done, or the experiment has changed since a phase that is kept.
    """
    runs = list_runs(root, experiment.name)
    sft = max((run for run in runs if run.stage == "sft"), key=lambda run: run.number, default=None)
    if sft is None:
        raise PipelineError(
            f"there is no run of `{experiment.name}` under {root} to go on with",
            code="nothing-to-resume",
            mend="start with `pipeline align EXPERIMENT`, without --resume",
        )
    on_it = (run for run in runs if run.stage == "dpo" and run.manifest.get("parent") == sft.name)
    dpo = max(on_it, key=lambda run: run.number, default=None) if sft.status == "finished" else None
    if dpo is not None and dpo.status == "finished" and (dpo.path / "compare.json").exists():
        raise PipelineError(
            f"{sft.name} and {dpo.name} are finished and compared, so there is nothing to resume",
            code="nothing-to-resume",
            file=dpo.path,
            mend="start anew with `pipeline align EXPERIMENT`, without --resume",
        )
    for run in (sft, dpo):
        if run is not None and run.status == "finished":
            then = load_experiment(run.path / "experiment.yaml").experiment
            changes = [
                *experiment_changes(then, experiment, run.stage),
                *data_changes(run.manifest["data"], _data_of(experiment, run.stage)),
            ]
            require_unchanged(run, changes, accepted=resume.accept_changes)
    return _Stopped(sft, dpo)


def _phase(
    run: Run | None, resume: Resume | None, console: Console, train: Callable[[Resume | None], Outcome]
) -> Outcome:
    """Keeps a finished phase, resumes an unfinished one, begins one that was not begun or left no checkpoint."""
    if run is None or resume is None:
        return train(None)
    if run.status == "finished":
        console.print(f"kept: {run.path} is finished", highlight=False)
        return _kept(run)
    try:
        return train(replace(resume, run=str(run.path)))
    except PipelineError as error:
        if error.code != "no-checkpoint":
            raise
        console.print(f"{error.message}: this phase begins again at step 0", highlight=False)
        return train(None)


def _data_of(experiment: Experiment, stage: str) -> list[dict[str, Any]]:
    data, kind = experiment.data, "demonstration" if stage == "sft" else "preference"
    split = data.demonstrations if stage == "sft" else data.preferences
    if split is None:
        return []
    reports = {
        use: load_rows(Path(path), kind, set_aside=True, columns=split.map).report
        for use, path in split_files(split).items()
    }
    return [{"use": use, "sha256": report.sha256, "rows": report.rows} for use, report in reports.items()]


def _kept(run: Run) -> Outcome:
    account = run.manifest["trainable"]
    trainable = Trainable(
        account["trainable_parameters"],
        account["all_parameters"],
        account["groups"],
        account["modules"],
        unties_head=False,
        beyond_lora=account.get("beyond_lora", {}),
    )
    more = {"reference": run.manifest["reference"]} if run.stage == "dpo" else {}
    return Outcome(run.path, run.status, run.manifest["metrics"], trainable, more)
