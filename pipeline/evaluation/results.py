"""The figures of one comparison, and the file `compare.json` that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.evaluation.harness import TaskFigure
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.judge import Judged
from pipeline.evaluation.verdict import Verdict
from pipeline.runs.files import write_json

COMPARISON = "compare.json"


@dataclass(frozen=True)
class Sample:
    """One prompt and what every model made of it."""

    prompt: str | list[dict[str, Any]]
    reference: str | None
    """The answer of the demonstration."""
    outputs: dict[str, str]
    """By model."""
    checks: dict[str, dict[str, bool]]
    """By model and check."""


@dataclass(frozen=True)
class PairScore:
    """One held-out preference and the reward margin that every model gives it."""

    prompt: Any
    chosen: Any
    rejected: Any
    """Text or messages, as in the data."""
    margins: dict[str, float | None]
    """By model; null where it is not finite."""


@dataclass(frozen=True)
class Comparison:
    """The same questions put to several models.

    A metric that does not apply to a model is not in its `metrics`; one that came out infinite or undefined
    is not either, and `absent` says why, since JSON has no such numbers.
    """

    models: list[str]
    base: str | None
    """The model that `deltas` are against."""
    metrics: dict[str, dict[str, Estimate]]
    deltas: dict[str, dict[str, Estimate]]
    samples: list[Sample]
    seconds: dict[str, float]
    """What each model took."""
    absent: dict[str, dict[str, str]] = field(default_factory=dict)
    between: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    """Every model less each earlier one that is not the base: by model, the earlier one, and metric."""
    pairs: list[PairScore] = field(default_factory=list)
    """Held-out preferences, with the margins of the models that have a reference."""
    verdict: Verdict | None = None
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each tuned model is: `run` (its name, or the adapter's folder) and the adapter's `sha256`."""
    judge: dict[str, dict[str, Judged]] = field(default_factory=dict)
    """What the judge made of a model's answers against another's: by model, then by the other."""
    lm_eval: dict[str, dict[str, TaskFigure]] = field(default_factory=dict)
    """What lm-eval's tasks gave, by model and `task/metric`; they enter no verdict."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How answers were made: `prompts`, `max_new_tokens`, `temperature` (0: greedy), `top_p`, `seed`; and, where it was
    asked for, `lm_eval` with its settings and version."""

    def as_dict(self) -> dict[str, Any]:
        """The comparison as `compare.json` holds it."""
        return {
            "models": list(self.models),
            "versions": self.versions,
            "settings": self.settings,
            "base": self.base,
            "metrics": _plain(self.metrics),
            "deltas": _plain(self.deltas),
            "absent": self.absent,
            "seconds": {model: round(seconds, 3) for model, seconds in self.seconds.items()},
            "between": {model: _plain(others) for model, others in self.between.items()},
            "judge": {
                model: {other: judged.as_dict() for other, judged in others.items()}
                for model, others in self.judge.items()
            },
            "lm_eval": {
                model: {name: figure.as_dict() for name, figure in figures.items()}
                for model, figures in self.lm_eval.items()
            },
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "pairs": [asdict(pair) for pair in self.pairs],
            "samples": [asdict(sample) for sample in self.samples],
        }


def _plain(figures: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {
        model: {name: estimate.as_dict() for name, estimate in metrics.items()} for model, metrics in figures.items()
    }


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Writes `compare.json`, whole or not at all.

    Raises:
        ValueError: a figure is infinite or not a number.
        OSError: the disk refused.
    """
    write_json(path, comparison.as_dict())


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """The `compare.json` of a run folder; None where the run was not compared.

    Raises:
        PipelineError: the file is damaged.
    """
    path = folder / COMPARISON
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict) or not {"models", "metrics", "deltas", "samples"} <= value.keys():
        raise _damaged(path, "it holds no models, metrics, deltas and samples")
    return value


def _damaged(path: Path, cause: str) -> PipelineError:
    return PipelineError(
        f"the comparison cannot be read: {cause}",
        code="damaged-comparison",
        file=path,
        mend="run `pipeline compare` again",
    )


def samples_worth_showing(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The `count` samples on which the models' checks differ most, in the order of the prompts."""

    def disagreements(index: int) -> int:
        outcomes = samples[index].checks.values()
        names = {name for checks in outcomes for name in checks}
        return sum(len({checks.get(name) for checks in outcomes}) > 1 for name in names)

    best = sorted(range(len(samples)), key=lambda index: (-disagreements(index), index))[:count]
    return [samples[index] for index in sorted(best)]
