"""The same base with different adapters, put to the same held-out questions.

One model object is held in memory; a `Policy` switches it to one set of weights. What the models are asked,
how they are checked and what is measured is the same for all, so that every difference is the weights'.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from pipeline.data.rows import Preference
from pipeline.data.tokens import Completion, Pair
from pipeline.evaluation.checks import Checks, check_answer, require_references
from pipeline.evaluation.divergence import Divergence, fitting
from pipeline.evaluation.generation import Answer, Sampling, generate
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.kept_logps import KeptLogps
from pipeline.evaluation.known_prompts import KnownPrompts
from pipeline.evaluation.preference import See, completion_logps, pair_logps, preference_scores
from pipeline.evaluation.questions import Question
from pipeline.evaluation.results import Comparison, PairScore, Sample
from pipeline.evaluation.summary import General, Measured, differences, figures
from pipeline.evaluation.verdict import verdict_of

Progress: TypeAlias = Callable[[str, str, int, int], None]
"""Called with the model's name, what is being done, how many of these are done, and of how many."""


@dataclass(frozen=True)
class Policy:
    """One set of weights."""

    key: str
    """Equal keys are equal weights: what was scored with one is not scored again."""
    activate: Callable[[], AbstractContextManager[Any]]
    """Gives the model with these weights, for as long as the context lasts."""
    kept: KeptLogps | None = None
    """Log-probabilities of pairs under these weights that are kept from before."""


@dataclass(frozen=True)
class Candidate:
    """A policy to be compared, and what it was trained against."""

    name: str
    policy: Policy
    reference: Policy | None = None
    """Where its implicit reward starts: a DPO run's SFT adapter, an SFT run's base. The base has none."""
    beta: float = 0.1
    """The scale of the reward margin."""


@dataclass(frozen=True)
class Asked:
    """What every model is asked; what is empty is not measured."""

    questions: Sequence[Question] = ()
    checks: Checks = field(default_factory=Checks)
    completions: Sequence[Completion] = ()
    """Held-out demonstrations, for the perplexity (`questions.completion_of`)."""
    general: Sequence[Completion] = ()
    """The regression set: questions about anything but the task, and their reference answers."""
    pairs: Sequence[Pair] = ()
    """Held-out preferences (`tokens.tokenize_pair`)."""
    preferences: Sequence[Preference] = ()
    """The same as rows, one for each of `pairs`, to be shown; or none."""
    max_new_tokens: int = 128
    sampling: Sampling | None = None
    """None: greedy."""
    batch_size: int = 25
    """Questions at a time."""
    scoring_batch_size: int = 8
    """Completions at a time to score: fewer, since each needs the logits of all its tokens at once."""


def compare(
    candidates: Sequence[Candidate],
    tokenizer: Any,
    asked: Asked,
    *,
    base: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Asks every candidate the same and sums up what they did.

    Args:
        candidates: each with a name of its own.
        tokenizer: the models' own.
        asked: the questions, what is checked and what is scored. Completions that truncation left without a
        token
            are not scored, as the trainer drops them.
        base: the name of the candidate that the deltas are against; None: there are no deltas.
        seed: of the bootstrap intervals.
        progress: see `Progress`.

    Raises:
        PipelineError: a field to match is in no reference answer, or a prompt cannot be asked.
    """
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names), "two candidates have one name"
    assert base is None or base in names, "the base is not among the candidates"
    require_references([question.reference for question in asked.questions], asked.checks)
    completions = [completion for completion in asked.completions if completion.scored_tokens]
    general = [completion for completion in asked.general if completion.scored_tokens]
    scorable = [at for at, pair in enumerate(asked.pairs) if pair.chosen_ids and pair.rejected_ids]
    pairs = [asked.pairs[at] for at in scorable]

    measured: dict[str, Measured] = {}
    seconds: dict[str, float] = {}
    scored: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    distributions: dict[str, dict[int, torch.Tensor]] = {}
    choices: list[torch.Tensor] | None = None
    for at, candidate in enumerate(candidates):
        started = time.perf_counter()
        divergence = _divergence(candidate, candidates[at + 1 :], completions, asked, distributions)
        with candidate.policy.activate() as model:
            logps, answers = _logps_and_answers(
                model, tokenizer, asked, completions, candidate.name, progress, divergence.see
            )
            known, chosen = _general(model, general, asked.scoring_batch_size, choices)
        if candidate.name == base:
            choices = chosen
        if divergence.kept:
            distributions[candidate.policy.key] = divergence.kept
        measured[candidate.name] = Measured(
            answers,
            [
                _checked(answer, question, asked.checks)
                for answer, question in zip(answers, asked.questions, strict=True)
            ],
            logps.tolist(),
            [completion.scored_tokens for completion in completions],
            _margins(candidate, pairs, asked.scoring_batch_size, scored, progress),
            [divergence.nats[index] for index in sorted(divergence.nats)],
            known,
        )
        seconds[candidate.name] = time.perf_counter() - started
    comparison = _summed_up(measured, asked.questions, seconds, base, seed)
    references = {one.name: one.reference.key for one in candidates if one.reference is not None}
    between = _between(measured, references, base, seed)
    shown = [asked.preferences[at] for at in scorable] if asked.preferences else []
    checks = {name: rows.checks for name, rows in measured.items()}
    against = {name: {**others, **_against_base(comparison, name)} for name, others in between.items()}
    return replace(
        comparison,
        between=between,
        pairs=_pair_scores(measured, shown),
        verdict=verdict_of(checks, against, seed=seed),
    )


def _divergence(
    candidate: Candidate,
    later: Sequence[Candidate],
    completions: Sequence[Completion],
    asked: Asked,
    distributions: dict[str, dict[int, torch.Tensor]],
) -> Divergence:
    """What measures the candidate's divergence; its reference is scored now, unless it was a candidate before.

    Distributions that no later candidate needs are let go: each may take a quarter of a gigabyte.
    """
    keep = any(one.reference is not None and one.reference.key == candidate.policy.key for one in later)
    reference = candidate.reference
    if reference is None:
        return Divergence(completions, None, keep=keep)
    if reference.key not in distributions:
        with reference.activate() as model:
            first = completions[: fitting(completions, model.config.get_text_config().vocab_size)]
            own = Divergence(first, None, keep=True)
            completion_logps(model, first, batch_size=asked.scoring_batch_size, share_prompts=True, see=own.see)
        distributions[reference.key] = own.kept
    against = distributions[reference.key]
    wanted = {one.reference.key for one in later if one.reference is not None}
    for key in set(distributions) - wanted:
        del distributions[key]
    return Divergence(completions, against, keep=keep)


def _general(
    model: Any, general: Sequence[Completion], batch_size: int, choices: Sequence[torch.Tensor] | None
) -> tuple[General | None, list[torch.Tensor]]:
    """The regression set under a model, and its most likely token at each place.

    Args:
        model: see `completion_logps`.
        general: reference answers, none of them without a token.
        batch_size: completions at a time.
        choices: the base's most likely tokens, to agree with.
    """
    if not general:
        return None, []
    chosen: dict[int, torch.Tensor] = {}
    logps = completion_logps(
        model,
        general,
        batch_size=batch_size,
        share_prompts=True,
        see=lambda at, logits: chosen.update({at: logits.argmax(dim=-1).cpu()}),
    )
    ours = [chosen[at] for at in range(len(general))]
    agreed = None
    if choices is not None:
        agreed = [int((own == other).sum()) for own, other in zip(ours, choices, strict=True)]
    return General(logps.tolist(), [completion.scored_tokens for completion in general], agreed), ours


def _logps_and_answers(
    model: Any,
    tokenizer: Any,
    asked: Asked,
    completions: Sequence[Completion],
    name: str,
    progress: Progress | None,
    see: See,
) -> tuple[torch.Tensor, list[Answer]]:
    """The demonstrations' log-probabilities, and answers that begin from what was computed of the prompts there."""
    known = KnownPrompts(model.device) if asked.questions else None
    logps = completion_logps(
        model,
        completions,
        batch_size=asked.scoring_batch_size,
        share_prompts=True,
        known=known,
        progress=_counter(progress, name, "demonstrations", len(completions)),
        see=see,
    )
    answers = generate(
        model,
        tokenizer,
        [question.prompt for question in asked.questions],
        max_new_tokens=asked.max_new_tokens,
        batch_size=asked.batch_size,
        sampling=asked.sampling,
        tools=[question.tools for question in asked.questions],
        known=known,
        progress=_counter(progress, name, "answers", len(asked.questions)),
    )
    return logps, answers


def _checked(answer: Answer, question: Question, checks: Checks) -> dict[str, bool]:
    return {**check_answer(answer.text, question.reference, checks), "ends_by_itself": answer.ended}


def _margins(
    candidate: Candidate,
    pairs: Sequence[Pair],
    batch_size: int,
    scored: dict[str, tuple[torch.Tensor, torch.Tensor]],
    progress: Progress | None,
) -> list[float] | None:
    """The candidate's reward margins; what was scored with equal weights before is taken from `scored`."""
    if candidate.reference is None or not pairs:
        return None

    def logps_of(policy: Policy) -> Callable[[Sequence[Pair]], tuple[torch.Tensor, torch.Tensor]]:
        def logps(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
            if policy.key not in scored:
                ticking = _counter(progress, candidate.name, "preferences", 2 * len(pairs))
                with policy.activate() as model:
                    score = partial(pair_logps, model, batch_size=batch_size, share_prompts=True)
                    kept = policy.kept.of(pairs, score) if policy.kept is not None else None
                    if kept is not None and ticking is not None:
                        ticking(2 * len(pairs))
                    scored[policy.key] = kept or score(pairs, progress=ticking)
            return scored[policy.key]

        return logps

    scores = preference_scores(logps_of(candidate.policy), logps_of(candidate.reference), pairs, candidate.beta)
    return [float(score) for score in scores]


def _counter(progress: Progress | None, name: str, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(name, what, done, total)

    return advance


def _between(
    measured: Mapping[str, Measured], references: Mapping[str, str], base: str | None, seed: int
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Every model less each earlier one; rewards only where both are measured against one reference."""
    tuned = [name for name in measured if name != base]
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for at, name in enumerate(tuned):
        found[name] = {}
        for earlier in tuned[:at]:
            apart = differences(measured[name], measured[earlier], seed=seed)
            if references.get(name) != references.get(earlier):
                apart = {metric: value for metric, value in apart.items() if not metric.startswith("preference_")}
            found[name][earlier] = apart
    return found


def _against_base(comparison: Comparison, name: str) -> dict[str, dict[str, Estimate]]:
    return {comparison.base: comparison.deltas[name]} if comparison.base is not None else {}


def _pair_scores(measured: Mapping[str, Measured], rows: Sequence[Preference]) -> list[PairScore]:
    margins = {name: some.margins for name, some in measured.items() if some.margins is not None}
    return [
        PairScore(
            row.prompt,
            row.chosen,
            row.rejected,
            {name: some[at] if math.isfinite(some[at]) else None for name, some in margins.items()},
        )
        for at, row in enumerate(rows)
    ]


def _summed_up(
    measured: Mapping[str, Measured],
    questions: Sequence[Question],
    seconds: dict[str, float],
    base: str | None,
    seed: int,
) -> Comparison:
    metrics, deltas, absent = {}, {}, {}
    for name, rows in measured.items():
        metrics[name], unusable = figures(rows, seed=seed)
        if unusable:
            absent[name] = unusable
        if base is not None and name != base:
            deltas[name] = differences(rows, measured[base], seed=seed)
    samples = [
        Sample(
            question.prompt if isinstance(question.prompt, str) else [dict(turn) for turn in question.prompt],
            question.reference,
            {name: rows.answers[index].text for name, rows in measured.items()},
            {name: dict(rows.checks[index]) for name, rows in measured.items()},
        )
        for index, question in enumerate(questions)
    ]
    return Comparison(list(measured), base, metrics, deltas, samples, seconds, absent)
