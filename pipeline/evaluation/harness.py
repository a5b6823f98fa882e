"""Tasks of EleutherAI's lm-evaluation-harness (the package `lm_eval`), put to every version.

What its tasks ask and how they are scored is lm-eval's: figures and standard errors are passed through as they come. It
gets the very model that everything else is asked of, with the version's adapter on it, and loads none by itself.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from fnmatch import filter as matching
from functools import cache
from typing import Any

from pipeline.errors import PipelineError
from pipeline.experiment import LmEval

_POINTER = "/evaluation/lm_eval"
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")
"""What stands beside the metrics in a task's result."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task."""

    value: float
    stderr: float | None
    """lm-eval's standard error; None where it gives none."""
    n: int | None
    """How many rows were asked."""

    def as_dict(self) -> dict[str, Any]:
        """For `compare.json`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:#.4g}" if self.stderr is None else f"{self.value:#.4g} ± {self.stderr:#.2g}"


def require_tasks(settings: LmEval) -> None:
    """lm-eval has to be installed, and to know the tasks; asked before anything that takes long.

    Raises:
        PipelineError: it is not, or does not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PipelineError(
            "`evaluation.lm_eval` needs lm-eval, which is not installed",
            code="missing-package",
            pointer=_POINTER,
            mend='pip install "preference-pipeline[lm-eval]"; `pipeline compare --no-lm-eval` goes without',
        )
    known = _manager(settings.include_path).all_tasks
    unknown = [task for task in settings.tasks if not matching(known, task)]
    if unknown:
        raise PipelineError(
            f"lm-eval {version()} knows no task {', '.join(f'`{task}`' for task in unknown)}",
            code="unknown-task",
            pointer=f"{_POINTER}/tasks",
            mend="`lm-eval ls tasks` lists its own; `include_path` names a folder of yours",
        )


def run_tasks(settings: LmEval, model: Any, tokenizer: Any) -> dict[str, TaskFigure]:
    """Every metric of every task, by `task/metric`, with lm-eval's filter behind a comma where it has one.

    Args:
        settings: the experiment's `evaluation.lm_eval`, for which `require_tasks` held.
        model: a Transformers model, or a PEFT model around one.
        tokenizer: the model's.

    Raises:
        PipelineError: lm-eval failed: no network for its data, a task that runs generated code, and the like.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(settings.include_path)
    try:
        with _quiet(), _left_tied(model):
            # Its own copy, since HFLM may give it another pad token.
            given = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=settings.batch_size)
            results = simple_evaluate(
                model=given,
                tasks=manager.match_tasks(list(settings.tasks)),
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                log_samples=False,
                apply_chat_template=settings.apply_chat_template,
                task_manager=manager,
                confirm_run_unsafe_code=False,
            )
    except Exception as error:
        raise PipelineError(
            f"lm-eval failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            code="lm-eval-failed",
            pointer=_POINTER,
            mend="try the task with lm-eval's own command; its data has to be in the cache where there is no network",
        ) from error
    return figures_of(results)


def figures_of(results: Mapping[str, Any]) -> dict[str, TaskFigure]:
    """The figures in what `simple_evaluate` gives.

    A metric stands there as `acc,none`, its standard error as `acc_stderr,none`: a number, or `N/A`.
    """
    figures = {}
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, _, chosen = key.partition(",")
            if key in _NO_METRIC or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{chosen}")
            # A group counts the rows of each metric: not all of its tasks have all of them.
            n = row.get("sample_count", {}).get(key, row.get("sample_len"))
            name = f"{task}/{metric}" if chosen in ("", "none") else f"{task}/{metric},{chosen}"
            figures[name] = TaskFigure(float(value), float(stderr) if isinstance(stderr, int | float) else None, n)
    return figures


def task_rows(compared: Mapping[str, Any]) -> list[tuple[str, str, list[str | None]]]:
    """A `compare.json` as rows: `task/metric`, the number of rows asked, and each model's figure in words."""
    by_model = [compared.get("lm_eval", {}).get(model, {}) for model in compared["models"]]
    rows = []
    for name in dict.fromkeys(name for figures in by_model for name in figures):
        figures = [TaskFigure(**some[name]) if name in some else None for some in by_model]
        counts = sorted({figure.n for figure in figures if figure is not None and figure.n is not None})
        words = [None if figure is None else str(figure) for figure in figures]
        rows.append((name, "/".join(map(str, counts)), words))
    return rows


def version() -> str:
    """lm-eval's."""
    import lm_eval

    return str(lm_eval.__version__)


@cache
def _manager(include_path: str | None) -> Any:
    """lm-eval's index of tasks, its own and those in a folder; it reads some ten thousand files for it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings and worse only; stdout is the answer's (`--format json`)."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _left_tied(model: Any) -> Iterator[None]:
    """Keeps HFLM (0.4.13) from tying the head to the embeddings anew: a head that was opened is no longer tied."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.tie_weights = lambda *given, **named: None
    try:
        yield
    finally:
        del inner.tie_weights
