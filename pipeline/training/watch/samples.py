"""A few held-out prompts, answered at each evaluation: what the policy writes says more than its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.check import load_rows
from pipeline.data.rows import Demonstration, Preference
from pipeline.errors import PipelineError
from pipeline.evaluation.generation import generate
from pipeline.evaluation.questions import Question, question_of
from pipeline.experiment import Experiment
from pipeline.machine import is_out_of_memory
from pipeline.training.engine import attention, short
from pipeline.training.engine.linear import added_up
from pipeline.training.watch.history import Sample

_READS = ("sdpa", attention.NAME)
"""Attention in whose place that of short rows is put; in SFT `padding_free` does so by itself."""


def sample_questions(experiment: Experiment, held_out: Sequence[Demonstration | Preference]) -> list[Question]:
    """The first `tracking.samples` of `evaluation.prompts`, or of the stage's own held-out rows where none is named.

    Raises:
        PipelineError: the prompts cannot be read, or one is not a demonstration.
    """
    count, prompts = experiment.tracking.samples, experiment.evaluation.prompts
    if count and prompts is not None:
        held_out = load_rows(Path(prompts), "demonstration").rows
    questions: list[Question] = []
    for row in held_out:
        if len(questions) == count:
            break
        asked = question_of(row) if isinstance(row, Demonstration) else Question(row.prompt, row.chosen, row.tools)
        if asked is not None:
            questions.append(asked)
    return questions


class Sampler:
    """Asks a policy in training the same questions every time.

    A sample is no more than a look: a prompt that the model has no room for, or memory that does not hold the answers,
    ends the looking and not the run.

    Args:
        trainer: whose policy answers.
        questions: what is asked; with none, nothing ever is.
        max_new_tokens: of an answer.
        say: tells the user one line.
    """

    def __init__(
        self, trainer: Any, questions: Sequence[Question], max_new_tokens: int, say: Callable[[str], None]
    ) -> None:
        self._trainer = trainer
        self._questions = questions
        self._max_new_tokens = max_new_tokens
        self._say = say

    def ask(self) -> list[Sample]:
        """The greedy answers; empty once it has failed."""
        if not self._questions:
            return []
        accelerator = self._trainer.accelerator
        model = accelerator.unwrap_model(self._trainer.model)
        try:
            with accelerator.autocast(), added_up(model), short.attending(model, short.NAME, _READS):
                answers = generate(
                    model,
                    self._trainer.processing_class,
                    [question.prompt for question in self._questions],
                    tools=[question.tools for question in self._questions],
                    max_new_tokens=self._max_new_tokens,
                    batch_size=len(self._questions),
                )
        except (PipelineError, RuntimeError, MemoryError) as error:
            if not isinstance(error, PipelineError) and not is_out_of_memory(error):
                raise
            why = error.message if isinstance(error, PipelineError) else "the memory does not hold them"
            self._say(f"no more sampled answers: {why}; `tracking.samples: 0` asks for none")
            self._questions = []
            return []
        return [
            Sample(_words(question.prompt), answer.text, answer.tokens, answer.ended)
            for question, answer in zip(self._questions, answers, strict=True)
        ]


def _words(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as one text: what was said last is what is asked."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
