"""Rows and prompts that stand in more than one file: what is trained on should not be what is evaluated on.

Prompts are compared without their system turns, and however they are cased, spaced and encoded; rows as they are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence, Set
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
    """What was asked for; the shards of one data set have it in common. Empty: the file itself."""

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


class _Indices:
    """What finds the rows and the prompts of one file."""

    def __init__(self, report: Report) -> None:
        self.rows = Index(report.prints.rows).fill()
        self.prompts = Index(report.prints.prompts).fill()


def warn_of_overlap(files: Sequence[CheckedFile], max_warnings: int) -> None:
    """Adds warnings and numbers to the reports of files that share rows or prompts.

    A row or prompt of a training file in an evaluation file is a warning for each row of the latter, and so is a row
    that is nearly the same, where that was looked for. Of two training files, or files whose use is not known, it is
    one warning in all: shared prompts may be meant there. Of shards, which are one data set, only whole rows count.

    Args:
        files: each once.
        max_warnings: how many a report keeps.
    """
    for file in files:
        if file.leaks_into(file) and file.report.rows:
            message = "the file is trained on and evaluated on"
            file.report.warn("evaluated-on-training-data", message, max_warnings)
    indices: dict[int, _Indices] = {}
    for first, second in combinations(files, 2):
        if not first.matters_to(second) or (first.name and first.name == second.name):
            continue
        if second.leaks_into(first) and not first.leaks_into(second):
            first, second = second, first
        if id(first) not in indices:
            indices[id(first)] = _Indices(first.report)
        _compare(first, second, indices[id(first)], max_warnings)
    for name in dict.fromkeys(file.name for file in files if file.name):
        _compare_shards([file.report for file in files if file.name == name], max_warnings)


def _compare(first: CheckedFile, second: CheckedFile, index: _Indices, max_warnings: int) -> None:
    """Warns in the report of `second`, which is the one that is evaluated on where one of the two is."""
    here, there = second.report, first.report
    copies = dict(_found(here, index.rows))
    prompts: dict[int, int] = {}
    for number, prompt in enumerate(here.prints.prompts):
        row = here.prints.prompt_row(number)
        if row not in copies and row not in prompts and (found := index.prompts.find(prompt)) is not None:
            prompts[row] = there.prints.prompt_row(found)
    if first.leaks_into(second):
        _warn_of_near_rows(here, there, copies.keys() | prompts.keys(), max_warnings)
    if not copies and not prompts:
        return
    here.audit.setdefault("overlap", []).append(
        {"file": there.file, "rows": len(copies) + len(prompts), "same_rows": len(copies)}
    )
    if first.leaks_into(second):
        named = [(row, other, "duplicate-across-files", "the same row") for row, other in copies.items()]
        named += [(row, other, "evaluated-on-training-data", "the prompt") for row, other in prompts.items()]
        for row, other, code, what in sorted(named):
            message = f"{what} is trained on at {there.prints.place(other).of(there.file)}"
            here.warn(code, message, max_warnings, *here.prints.place(row))
        return
    if copies:
        _warn_of_copies(here, copies, [there], [0], max_warnings)
    for row, other in list(prompts.items())[:1]:
        rows = "1 row has" if len(prompts) == 1 else f"{len(prompts):,} rows have"
        message = f"{rows} a prompt of {there.file}, this one that of its {there.prints.place(other)}"
        here.warn("shared-prompts", message, max_warnings, *here.prints.place(row))


def _warn_of_near_rows(here: Report, there: Report, known: Set[int], max_warnings: int) -> None:
    """Warns of each evaluated row that is nearly one that is trained on, and was not warned of before."""
    if here.near is None or there.near is None:
        return
    for number, other, similarity in there.near.in_other(here.near):
        if number not in known:
            at = there.prints.place(other).of(there.file)
            message = f"{similarity:.0%} the same as the row that is trained on at {at}"
            here.warn("near-duplicate-across-files", message, max_warnings, *here.prints.place(number))


def _found(report: Report, rows: Index) -> Iterator[tuple[int, int]]:
    """The numbers of the rows of `report` that another file has, each with its number there."""
    for number, value in enumerate(report.prints.rows):
        if (found := rows.find(value)) is not None:
            yield number, found


def _compare_shards(shards: Sequence[Report], max_warnings: int) -> None:
    """Warns in the report of each shard of the rows that an earlier one has."""
    if len(shards) < 2:
        return
    hashes, starts = array("Q"), []
    for shard in shards:
        starts.append(len(hashes))
        hashes.extend(shard.prints.rows)
    index = Index(hashes)
    for start, shard in zip(starts, shards, strict=True):
        copies = {}
        for number, value in enumerate(shard.prints.rows):
            earlier = index.add(start + number, value)
            if earlier is not None and earlier < start:
                copies[number] = earlier
        if copies:
            _warn_of_copies(shard, copies, shards, starts, max_warnings)


def _warn_of_copies(
    report: Report, copies: dict[int, int], others: Sequence[Report], starts: Sequence[int], max_warnings: int
) -> None:
    """One warning for all the rows of a file that stand in other files as well.

    Args:
        report: of the file.
        copies: numbers of its rows, each with that of the same row among those of `others`, one after another.
        others: reports of the other files.
        starts: the number of the first row of each.
        max_warnings: how many a report keeps.
    """
    row, same = next(iter(copies.items()))
    at = bisect_right(starts, same) - 1
    place = others[at].prints.place(same - starts[at]).of(others[at].file)
    rows = "1 row stands" if len(copies) == 1 else f"{len(copies):,} rows stand"
    message = f"{rows} in another file as well, this one at {place}"
    report.warn("duplicate-across-files", message, max_warnings, *report.prints.place(row))
