"""`pipeline align`: SFT, DPO on its adapter, the comparison of base, SFT and DPO, and the report, in one go."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.evaluation.results import Comparison
from pipeline.evaluation.runs import compare_runs
from pipeline.experiment import Experiment
from pipeline.model.device import give_memory_back
from pipeline.report.page import write_report
from pipeline.runs.run import read_run
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft
from pipeline.training.stage import Outcome
from pipeline.validation import require_experiment_data


def align(experiment: Experiment, root: Path, console: Console) -> tuple[list[Outcome], Comparison, Path]:
    """Both phases, their comparison and the report; every data file is proven before the first phase begins.

    Args:
        experiment: with absolute paths.
        root: where runs live.
        console: where the user is told what goes on.

    Returns:
        The outcomes of SFT and DPO, the comparison, which is also written into the DPO run, and the report's file.

    Raises:
        PipelineError: as the stages do; what was finished before stays.
    """
    require_experiment_data(experiment)
    console.rule("phase one: SFT")
    sft = run_sft(experiment, root, console)
    give_memory_back()
    console.rule("phase two: DPO")
    dpo = run_dpo(experiment, root, console, start=str(sft.run))
    give_memory_back()
    console.rule("compare")
    runs = [read_run(outcome.run) for outcome in (sft, dpo) if outcome.run is not None]
    comparison = compare_runs(runs, experiment, root, console)
    return [sft, dpo], comparison, write_report(runs[-1:], root)
