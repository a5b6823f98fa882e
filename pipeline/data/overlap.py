"""Prompts that stand in more than one file: what is trained on should not be what is evaluated on.

Prompts are compared without their system turns, and however they are cased, spaced and encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from pipeline.data.fingerprints import Index
from pipeline.data.result import Report

Stage = Literal["sft", "dpo", "evaluation"]


class Use(NamedTuple):
    """What an experiment does with a file."""

    stage: Stage
    trains: bool
    """Whether it is trained on; otherwise it is evaluated on."""


@dataclass
class CheckedFile:
    """A report and what its file is for."""

    report: Report
    uses: list[Use]
    """Empty: nobody said."""
    name: str = ""
    """What was asked for; shards of one data set have it in common and are not compared. Empty: the file itself."""

    @property
    def _trains(self) -> bool:
        return any(use.trains for use in self.uses)

    @property
    def _evaluates(self) -> bool:
        return any(not use.trains for use in self.uses)

    def leaks_into(self, other: CheckedFile) -> bool:
        """Whether a prompt of this file must not stand in the other one, which is evaluated on."""
        return self._trains and other._evaluates

    def matters_to(self, other: CheckedFile) -> bool:
        """Whether a prompt in both is worth a word: that of two files which are only evaluated on is not."""
        return not (self.uses and other.uses) or self._trains or other._trains


def warn_of_overlap(files: Sequence[CheckedFile], max_warnings: int) -> None:
    """Adds warnings and numbers to the reports of files that share prompts.

    A prompt of a training file in an evaluation file is a warning for each row of the latter. Of two training files, or
    files whose use is not known, it is one warning in all: that may be meant.

    Args:
        files: each once.
        max_warnings: how many a report keeps.
    """
    for file in files:
        if file.leaks_into(file) and file.report.rows:
            message = "the file is trained on and evaluated on"
            file.report.warn("evaluated-on-training-data", message, max_warnings)
    indices: dict[int, Index] = {}
    for first, second in combinations(files, 2):
        if not first.matters_to(second) or (first.name and first.name == second.name):
            continue
        if second.leaks_into(first) and not first.leaks_into(second):
            first, second = second, first
        if id(first) not in indices:
            indices[id(first)] = Index(first.report.prints.prompts).fill()
        _compare(first, second, indices[id(first)], max_warnings)


def _compare(first: CheckedFile, second: CheckedFile, index: Index, max_warnings: int) -> None:
    """Warns in the report of `second`, which is the one that is evaluated on where one of the two is."""
    here, there = second.report, first.report
    leaks = first.leaks_into(second)
    lines: set[int] = set()
    start: tuple[int, int] | None = None
    for number, prompt in enumerate(here.prints.prompts):
        if (found := index.find(prompt)) is None:
            continue
        line, other = here.prints.prompt_line(number), there.prints.prompt_line(found)
        if line in lines:
            continue
        lines.add(line)
        start = start or (line, other)
        if leaks:
            message = f"the prompt is trained on at {there.file}:{other}"
            here.warn("evaluated-on-training-data", message, max_warnings, line)
    if start is None:
        return
    here.audit.setdefault("overlap", []).append({"file": there.file, "rows": len(lines)})
    if not leaks:
        rows = "1 row has" if len(lines) == 1 else f"{len(lines):,} rows have"
        message = f"{rows} a prompt of {there.file}, this one that of its line {start[1]}"
        here.warn("shared-prompts", message, max_warnings, start[0])
