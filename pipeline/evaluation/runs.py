"""`pipeline compare`: runs and adapters of one base, put to the held-out questions of their experiment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
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

from pipeline import cache
from pipeline.data.check import load_rows
from pipeline.data.rows import Preference
from pipeline.data.tokenised import tokenize_preferences
from pipeline.data.tokens import Completion, Pair
from pipeline.errors import PipelineError
from pipeline.evaluation.beginning import remembers_keys_alone
from pipeline.evaluation.checks import checks_of
from pipeline.evaluation.compare import Asked, Candidate, Policy, compare
from pipeline.evaluation.generation import Sampling
from pipeline.evaluation.harness import TaskFigure, require_tasks, run_tasks, version
from pipeline.evaluation.judge import Judged, judge_pairs, key_of
from pipeline.evaluation.kept_logps import KeptLogps
from pipeline.evaluation.questions import Question, completion_of, question_of
from pipeline.evaluation.results import COMPARISON, Comparison, write_comparison
from pipeline.evaluation.wording import last_said
from pipeline.experiment import Experiment, Judge, LmEval
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import adapter_sha256, attached, hashes_of, require_adapter
from pipeline.model.base import load_base
from pipeline.model.builtin import cache_directory
from pipeline.model.device import Placement
from pipeline.model.ground import Ground, prepare_ground, quiet_libraries
from pipeline.runs.files import write_atomically
from pipeline.runs.run import Run
from pipeline.training.engine.attention import NAME
from pipeline.training.engine.linear import added_up, join_products
from pipeline.training.engine.precision import Products, multiplication
from pipeline.training.engine.prepacked import laid_out
from pipeline.training.engine.reference import ReferenceStore, reference_key
from pipeline.training.engine.short import attending_by_products
from pipeline.training.start import find_adapter
from pipeline.training.tolerance import tolerance_for

BASE = "base"
_GENERAL = Path(__file__).resolve().parent.parent / "datasets" / "general" / "general.jsonl"
"""The regression set; the link `pipeline/datasets` leads there."""


def compare_runs(
    runs: Sequence[Run | Path],
    experiment: Experiment,
    root: Path,
    console: Console,
    *,
    with_base: bool = True,
    with_judge: bool = True,
    with_lm_eval: bool = True,
) -> Comparison:
    """Asks the base and every run the experiment's held-out questions; writes `compare.json` into the last run.

    Args:
        runs: runs of ours, or folders of PEFT adapters.
        experiment: whose base, questions and checks are used.
        root: where runs live; a DPO run's reference is found there.
        console: where progress is shown.
        with_judge: lets the experiment's judge compare the answers, if it names one.
        with_lm_eval: puts the experiment's tasks of lm-eval to every version, if it names any.
        with_base: also asks the base, and gives every difference to it.

    Raises:
        PipelineError: a run did not finish, was trained on another base, or there is nothing to ask.
    """
    quiet_libraries()
    for run in runs:
        _require_finished(run)
    if experiment.evaluation.judge is not None and with_judge:
        key_of(experiment.evaluation.judge)  # missed now rather than after all answers are written
    tasks = experiment.evaluation.lm_eval if with_lm_eval else None
    if tasks is not None:
        require_tasks(tasks)
    questions = _questions(experiment)
    ground = prepare_ground(experiment, console.print)
    for run in runs:
        _require_same_base(run, ground)
    asked = _asked(experiment, ground.tokenizer, questions)
    model = load_base(ground.files, experiment.model, ground.placement)
    base = Policy(ground.base_sha256, partial(_as_it_is, model))
    names = _names(runs)
    candidates = [Candidate(BASE, base)] if with_base else []
    with (
        _progress(console) as ticking,
        multiplication(experiment.engine.precision, ground.placement.device) as products,
        attending_by_products(model),
    ):
        quantize = experiment.model.quantize
        kept = partial(_kept, model, ground.placement, ground.base_sha256, quantize, products)
        policy = partial(_policy, model, kept)
        candidates += [_candidate(name, run, policy, base, root) for name, run in zip(names, runs, strict=True)]
        comparison = compare(
            candidates,
            ground.tokenizer,
            asked,
            base=BASE if with_base else None,
            seed=experiment.seed,
            progress=ticking,
        )
    evaluation = experiment.evaluation
    if tasks is not None:
        with multiplication(experiment.engine.precision, ground.placement.device):
            comparison = _with_tasks(tasks, comparison, candidates, ground.tokenizer, console)
    if evaluation.judge is not None and with_judge:
        comparison = _judged(evaluation.judge, comparison, experiment.seed, console)
    settings: dict[str, Any] = {
        "prompts": evaluation.prompts,
        "max_new_tokens": evaluation.max_new_tokens,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "seed": experiment.seed,
    }
    if tasks is not None:
        settings["lm_eval"] = {"version": version(), **tasks.model_dump(mode="json")}
    versions = {name: _version(run) for name, run in zip(names, runs, strict=True)}
    comparison = replace(comparison, versions=versions, settings=settings)
    if isinstance(runs[-1], Run):
        write_comparison(runs[-1].path / COMPARISON, comparison)
        samples = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in comparison.as_dict()["samples"])
        write_atomically(runs[-1].path / "samples.jsonl", "".join(samples))
    return comparison


def _judged(settings: Judge, comparison: Comparison, seed: int, console: Console) -> Comparison:
    """The comparison with each version judged against the one before it."""
    questions = [
        sample.prompt
        if isinstance(sample.prompt, str)
        else "\n\n".join(f"{turn['role']}: {last_said([turn])}" for turn in sample.prompt)
        for sample in comparison.samples
    ]
    found: dict[str, dict[str, Judged]] = {}
    absent = dict(comparison.absent)
    for earlier, name in pairwise(comparison.models):
        ours, theirs = ([sample.outputs[model] for sample in comparison.samples] for model in (name, earlier))
        console.print(f"judge: {name} against {earlier}", highlight=False)
        try:
            judged = judge_pairs(settings, questions, ours, theirs, cache=cache_directory() / "judge", seed=seed)
        except PipelineError as error:  # everything else is measured by now, and is not thrown away
            absent[name] = {**absent.get(name, {}), "judge": error.message}
        else:
            found[name] = {earlier: judged}
    return replace(comparison, judge=found, absent=absent)


def _with_tasks(
    settings: LmEval, comparison: Comparison, candidates: Sequence[Candidate], tokenizer: Any, console: Console
) -> Comparison:
    """The comparison with lm-eval's figures of each version."""
    found: dict[str, dict[str, TaskFigure]] = {}
    absent = dict(comparison.absent)
    for at, candidate in enumerate(candidates):
        console.print(f"lm-eval: {candidate.name}: {', '.join(settings.tasks)}", highlight=False, markup=False)
        try:
            with candidate.policy.activate() as model:
                found[candidate.name] = run_tasks(settings, model, tokenizer)
        except PipelineError as error:  # everything else is measured by now, and the next version would fail as well
            for left in candidates[at:]:
                absent[left.name] = {**absent.get(left.name, {}), "lm_eval": error.message}
            break
    return replace(comparison, lm_eval=found, absent=absent)


def _version(run: Run | Path) -> dict[str, Any]:
    folder = run if isinstance(run, Path) else run.adapter
    return {"run": str(run) if isinstance(run, Path) else run.name, "sha256": adapter_sha256(folder)}


def experiment_of(run: Run | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The resolved experiment that a run keeps, with `KEY=VALUE` overrides.

    Raises:
        PipelineError: a foreign adapter keeps none, or the file is damaged.
    """
    if isinstance(run, Path):
        raise PipelineError(
            f"{run} is an adapter folder, which names no held-out questions",
            code="no-experiment",
            file=run,
            mend="name a run first, or give an experiment with --experiment",
        )
    return load_experiment(run.path / "experiment.yaml", overrides).experiment


def _require_finished(run: Run | Path) -> None:
    if isinstance(run, Run) and run.status != "finished":
        raise PipelineError(
            f"{run.name} is {run.status}, so there is no trained adapter to compare",
            code="no-finished-run",
            file=run.path,
            mend="name finished runs",
        )


def _require_same_base(run: Run | Path, ground: Ground) -> None:
    if isinstance(run, Run) and run.manifest["base"]["sha256"] != ground.base_sha256:
        raise PipelineError(
            f"{run.name} was trained on other base weights ({run.manifest['base']['id']}) than {ground.files.id}",
            code="other-base",
            file=run.path,
            mend="compare runs of one base",
        )


def _questions(experiment: Experiment) -> list[Question]:
    evaluation = experiment.evaluation
    if evaluation.prompts is None:
        raise PipelineError(
            "the experiment names no held-out prompts to compare on",
            code="missing-key",
            pointer="/evaluation/prompts",
            mend="add `evaluation: {prompts: FILE}`, a file of demonstration rows that training does not see",
        )
    columns = experiment.data.columns(evaluation.prompts, "demonstration")
    rows = load_rows(Path(evaluation.prompts), "demonstration", columns=columns).rows[: evaluation.max_prompts]
    return [question for row in rows if (question := question_of(row)) is not None]


def _asked(experiment: Experiment, tokenizer: Any, questions: list[Question]) -> Asked:
    evaluation, preferences = experiment.evaluation, experiment.data.preferences
    held_out = preferences.eval if preferences is not None else None
    pairs: list[Pair] = []
    shown: list[Preference] = []
    if held_out is not None:  # the rows that DPO was evaluated on: its manifest counts those that were set aside
        aside, columns = experiment.data.on_invalid == "set-aside", experiment.data.columns(held_out, "preference")
        rows = load_rows(Path(held_out), "preference", set_aside=aside, columns=columns)
        length = experiment.dpo.max_length
        pairs, counted = tokenize_preferences(tokenizer, rows, length)
        shown = list(rows)
        if counted.dropped:
            shown = [row for row in shown if tokenize_preferences(tokenizer, [row], length)[0]]
    sampling = None
    if evaluation.temperature > 0:
        sampling = Sampling(evaluation.temperature, evaluation.top_p, experiment.seed)
    return Asked(
        questions=questions,
        sampling=sampling,
        general=_general(tokenizer, experiment.sft.max_length) if evaluation.regression else (),
        checks=checks_of(evaluation),
        completions=[completion_of(tokenizer, one, experiment.sft.max_length) for one in questions],
        pairs=pairs,
        preferences=shown,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
    )


def _general(tokenizer: Any, max_length: int) -> list[Completion]:
    """The regression set; as plain text where the model has no chat template."""
    found = [question_of(row) for row in load_rows(_GENERAL, "demonstration").rows]
    questions = [question for question in found if question is not None]
    if tokenizer.chat_template is None:
        texts = [(last_said(question.prompt), question.reference or "") for question in questions]
        questions = [Question(f"{asked}\n", answer) for asked, answer in texts]
    return [completion_of(tokenizer, question, max_length) for question in questions]


def _names(runs: Sequence[Run | Path]) -> list[str]:
    """`sft` and `dpo` where that tells the runs apart, else their names."""
    stages = [run.stage if isinstance(run, Run) else run.name for run in runs]
    names = stages if len(set(stages)) == len(stages) else [str(r) if isinstance(r, Path) else r.name for r in runs]
    if BASE in names or len(set(names)) != len(names):
        raise PipelineError(
            f"one run is named twice, or one is called `{BASE}`: {', '.join(names)}",
            code="conflict",
            mend="name each run once",
        )
    return names


def _candidate(name: str, run: Run | Path, policy: Callable[[Path], Policy], base: Policy, root: Path) -> Candidate:
    if isinstance(run, Path):
        return Candidate(name, policy(run))
    own = experiment_of(run)
    if run.stage == "sft":
        return Candidate(name, policy(run.adapter), base, own.dpo.beta)
    _, parent = find_adapter(root, str(run.manifest["parent"]))
    start = parent.adapter if isinstance(parent, Run) else parent
    return Candidate(name, policy(run.adapter), policy(start), own.dpo.beta)


def _policy(model: Any, kept: Callable[[Path], KeptLogps | None], folder: Path) -> Policy:
    return Policy(str(require_adapter(folder).resolve()), partial(_adapted, model, folder), kept(folder))


def _kept(
    model: Any, placement: Placement, base_sha256: str, quantize: str, products: Products, folder: Path
) -> KeptLogps | None:
    """What `pipeline dpo` kept of the adapter in `folder` as its reference, where it was scored as it would be here.

    Not in half precision, where two ways of scoring differ by more than many a margin, nor of a model that `compare`
    scores with padding.
    """
    tolerance = tolerance_for(placement.dtype, quantize, rounds=products.round)
    if not tolerance.exact or not remembers_keys_alone(model):
        return None
    key = reference_key(
        base_sha256=base_sha256,
        adapter=hashes_of(folder),
        placement=placement,
        quantize=quantize,
        products=products,
        attention=NAME,
    )
    return KeptLogps(ReferenceStore(cache.folder_of("references"), key).read(), tolerance.start)


@contextmanager
def _adapted(model: Any, folder: Path) -> Iterator[Any]:
    with attached(model, folder) as policy:
        with suppress(PipelineError):  # an architecture whose blocks cannot be told apart goes PEFT's way
            join_products(policy, rounds=False)
        with added_up(policy):
            yield policy


@contextmanager
def _as_it_is(model: Any) -> Iterator[Any]:
    with laid_out(model):
        yield model


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A bar with time left on a terminal; one line for each piece of work elsewhere."""
    if not console.is_terminal:

        def line(name: str, what: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"compare: {name}: {done} {what}", highlight=False)

        yield line
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        tasks: dict[tuple[str, str], Any] = {}

        def move(name: str, what: str, done: int, total: int) -> None:
            key = (name, what)
            if key not in tasks:
                tasks[key] = bar.add_task(f"{name}: {what}", total=total)
            bar.update(tasks[key], completed=done)

        yield move
