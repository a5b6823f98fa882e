"""`pipeline validate`, and the gate in front of `align`: data files, or an experiment and every file it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.check import load_rows
from pipeline.data.overlap import CheckedFile, Stage, Use, warn_of_overlap
from pipeline.data.parallel import check_large_file
from pipeline.data.result import Report
from pipeline.data.shards import expand
from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment import Experiment, Split
from pipeline.experiment_file import load_experiment
from pipeline.token_check import add_tokens

_EXPERIMENT = {".yaml", ".yml"}


def validate(
    files: Sequence[Path],
    kind: str | None = None,
    *,
    max_errors: int = 100,
    near: bool | None = None,
    columns: Mapping[str, str] | None = None,
    tokens: bool | None = None,
) -> list[Report]:
    """Reports on data files; a YAML file is read as an experiment, whose data files are reported on.

    Args:
        files: data files, folders and globs of them, data sets (`hf:NAME:SPLIT`), and experiment files. Each shard
            has a report of its own.
        kind: what data files are for; None: found from each. An experiment states its own.
        max_errors: how many errors a report keeps; all are counted.
        near: whether to look for near duplicates; None: in files of up to 4 MiB.
        columns: names of columns of data files and the fields that they stand for.
        tokens: whether to tokenise an experiment's rows; None: up to 64 MiB of them.

    Raises:
        PipelineError: an experiment file is wrong.
    """
    reports = []
    loose = []
    for file in files:
        if file.suffix.lower() in _EXPERIMENT:
            reports += _of_experiment(load_experiment(file).experiment, max_errors, near, tokens)
        else:
            for path in expand(file):
                report = check_large_file(path, kind, max_errors=max_errors, near=near, columns=columns)
                loose.append(CheckedFile(report, [], str(file)))
                reports.append(report)
    warn_of_overlap(loose, max_errors)
    return reports


def _of_experiment(experiment: Experiment, max_errors: int, near: bool | None, tokens: bool | None) -> list[Report]:
    """The reports of the files that an experiment names; arguments are those of `validate`."""
    named: list[CheckedFile] = []
    for (name, kind), uses in _uses(experiment).items():
        columns = experiment.data.columns(str(name), kind)
        for path in expand(name):
            report = check_large_file(path, kind, max_errors=max_errors, near=near, columns=columns)
            named.append(CheckedFile(report, uses, str(name)))
    warn_of_overlap(named, max_errors)
    add_tokens([one.report for one in named], experiment, max_errors, tokens)
    for name, kind in _uses(experiment):
        shards = [one.report for one in named if (one.name, one.report.kind) == (str(name), kind)]
        # Where no row is left, training is refused.
        if (
            _may_set_aside(experiment, name)
            and all(one.separable for one in shards)
            and any(one.valid for one in shards)
        ):
            for report in shards:
                report.put_aside(max_errors)
    return [one.report for one in named]


def _may_set_aside(experiment: Experiment, path: Path) -> bool:
    """Whether rows of a file that are wrong may be left out; of the questions that are compared on none may be."""
    prompts = experiment.evaluation.prompts
    return experiment.data.on_invalid == "set-aside" and (prompts is None or path != Path(prompts))


def _uses(experiment: Experiment) -> dict[tuple[Path, str], list[Use]]:
    """For each data file and its kind: what the experiment does with it."""
    uses: dict[tuple[Path, str], list[Use]] = {}
    demonstrations, preferences = experiment.data.demonstrations, experiment.data.preferences
    stages: tuple[tuple[Split | None, str, Stage], ...] = (
        (demonstrations, "demonstration", "sft"),
        (preferences, "preference", "dpo"),
    )
    for split, kind, stage in stages:
        if split is not None:
            uses.setdefault((Path(split.train), kind), []).append(Use(stage, trains=True))
            if split.eval is not None:
                uses.setdefault((Path(split.eval), kind), []).append(Use(stage, trains=False))
    if experiment.evaluation.prompts is not None:
        prompts = (Path(experiment.evaluation.prompts), "demonstration")
        uses.setdefault(prompts, []).append(Use("evaluation", trains=False))
    return uses


def require_experiment_data(experiment: Experiment) -> None:
    """Proves every data file of an experiment.

    Raises:
        PipelineErrors: what is wrong in any of them.
    """
    errors: list[PipelineError] = []
    for path, kind in _uses(experiment):
        columns = experiment.data.columns(str(path), kind)
        try:
            load_rows(path, kind, set_aside=_may_set_aside(experiment, path), columns=columns)
        except PipelineErrors as refused:
            errors += refused.errors
        except PipelineError as refused:
            errors.append(refused)
    if errors:
        raise PipelineErrors(errors)
