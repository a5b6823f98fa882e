"""Generations side by side: what each version changed, and which checks it failed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.evaluation.wording import last_said, metric_words

MOST_CHARACTERS = 1_500_000
"""Of prompts, references and answers together: the page stays below 5 MB with its marks."""
_LONGEST = 6000
"""Characters of one text that are shown."""
_ALIKE = 0.3
"""Below this similarity nearly every word is another: marks would say nothing."""
_PIECES = re.compile(r"\s+|\w+|[^\w\s]")

Piece = tuple[str, Literal["", "new", "gone"]]
"""Text, and how it is marked: as new, as gone, or not at all."""


@dataclass(frozen=True)
class Shown:
    """One version's answer."""

    model: str
    pieces: list[Piece]
    failed: list[str]
    """Metric names of the checks that it fails."""
    failed_words: list[str]


@dataclass(frozen=True)
class Prompt:
    """One prompt and what every version answered."""

    number: int
    """From 1, in the order of the held-out file."""
    text: str
    system: str | None
    reference: str | None
    answers: list[Shown]

    @property
    def fails(self) -> list[list[str]]:
        """Model and check of every failed check, for the filter."""
        return [[answer.model, name] for answer in self.answers for name in answer.failed]


def prompts_of(compared: Mapping[str, Any]) -> list[Prompt]:
    """The samples of a comparison, in order, as many as fit into the page.

    In each answer is marked what is new in it and what is gone since the version before; in the first one nothing is.
    """
    found, characters = [], 0
    for number, sample in enumerate(compared["samples"], start=1):
        outputs: dict[str, str] = sample["outputs"]
        characters += sum(map(len, outputs.values())) + len(str(sample["prompt"])) + len(sample.get("reference") or "")
        if characters > MOST_CHARACTERS:
            break
        answers: list[Shown] = []
        before: str | None = None
        for model in compared["models"]:
            text = _cut(outputs[model])
            failed = [name for name, holds in sample["checks"].get(model, {}).items() if not holds]
            pieces: list[Piece] = [(text, "")] if before is None else marked(text, before)
            answers.append(Shown(model, pieces, failed, [metric_words(name) for name in failed]))
            before = text
        reference = sample.get("reference")
        prompt = sample["prompt"]
        found.append(
            Prompt(
                number,
                _cut(last_said(prompt, "user")),
                _system(prompt),
                None if reference is None else _cut(reference),
                answers,
            )
        )
    return found


def checks_in(compared: Mapping[str, Any]) -> list[str]:
    """The names of all checks that a sample has, in order."""
    outcomes = (checks for sample in compared["samples"] for checks in sample["checks"].values())
    return list(dict.fromkeys(name for checks in outcomes for name in checks))


def marked(text: str, before: str) -> list[Piece]:
    """`text` in pieces, marked against `before`; without the pieces that are gone it is `text` again.

    Texts that have next to nothing in common are not marked.
    """
    words, others = _PIECES.findall(text), _PIECES.findall(before)
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return [(text, "")]
    pieces: list[Piece] = []
    for operation, other_start, other_end, start, end in matcher.get_opcodes():
        if operation in ("delete", "replace"):
            pieces.append(("".join(others[other_start:other_end]), "gone"))
        if operation != "delete":
            pieces.append(("".join(words[start:end]), "" if operation == "equal" else "new"))
    return pieces


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST:,} more characters]"


def _system(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return None
    said: Sequence[Any] = [turn.get("content") for turn in prompt if turn.get("role") == "system"]
    return _cut(said[0]) if said and isinstance(said[0], str) else None
