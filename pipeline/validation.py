"""`pipeline validate`, and the gate in front of `align`: data files, or an experiment and every file it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.check import Report, check_file, load_rows
from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment import Experiment
from pipeline.experiment_file import load_experiment

_EXPERIMENT = {".yaml", ".yml"}


def validate(files: Sequence[Path], kind: str | None = None, *, max_errors: int = 100) -> list[Report]:
    """Reports on data files; a YAML file is read as an experiment, whose data files are reported on.

    Args:
        files: data files and experiment files.
        kind: what data files are for; None: found from each. An experiment states its own.
        max_errors: how many errors a report keeps; all are counted.

    Raises:
        PipelineError: an experiment file is wrong.
    """
    reports = []
    for file in files:
        if file.suffix.lower() in _EXPERIMENT:
            named = named_files(load_experiment(file).experiment)
            reports += [check_file(path, its, max_errors=max_errors) for path, its in named]
        else:
            reports.append(check_file(file, kind, max_errors=max_errors))
    return reports


def named_files(experiment: Experiment) -> Iterator[tuple[Path, str]]:
    """The data files that an experiment names, each with its kind, each once."""
    named: dict[tuple[str, str], None] = {}
    for split, kind in (
        (experiment.data.demonstrations, "demonstration"),
        (experiment.data.preferences, "preference"),
    ):
        if split is not None:
            named[split.train, kind] = None
            if split.eval is not None:
                named[split.eval, kind] = None
    if experiment.evaluation.prompts is not None:
        named[experiment.evaluation.prompts, "demonstration"] = None
    for path, kind in named:
        yield Path(path), kind


def require_experiment_data(experiment: Experiment) -> None:
    """Proves every data file of an experiment.

    Raises:
        PipelineErrors: what is wrong in any of them.
    """
    errors: list[PipelineError] = []
    for path, kind in named_files(experiment):
        try:
            load_rows(path, kind)
        except PipelineErrors as refused:
            errors += refused.errors
        except PipelineError as refused:
            errors.append(refused)
    if errors:
        raise PipelineErrors(errors)
