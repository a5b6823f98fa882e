"""What the tokenizer does to each row: cut, merged, emptied or turned into structure, said before anything is trained.

Rows that cannot be trained on (errors) are left out and kept with their reasons; whether they may be left out at all
is `data.on_invalid`'s to say (`require_usable`). What only costs something (warnings) is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.data.aside import SetAside
from pipeline.data.check import CheckedRows, Violation
from pipeline.data.codes import TOKEN_MENDS
from pipeline.data.control_tokens import ControlTokens
from pipeline.data.masks import IGNORED, Labelled, cut, label_demonstration, special_ids
from pipeline.data.place import shown
from pipeline.data.rows import Demonstration, Preference
from pipeline.data.tokens import Pair, Sequences, tokenize_sequences
from pipeline.errors import ExitCode, PipelineError, PipelineErrors

WARNINGS = ("prompt-not-prefix", "completion-cut", "stop-cut", "no-stop-token", "foreign-control-token")
"""Codes of what is counted, and trained on nonetheless."""
_KEPT = 100
"""Findings that are kept with their place for each severity; all are counted."""
_FIRST_SHOWN = 5


@dataclass
class Counted:
    """What tokenising did to the rows of a file."""

    file: str = ""
    max_length: int = 0
    rows: int = 0
    used: int = 0
    truncated: int = 0
    """Rows of more than `max_length` tokens, left out or cut at their end."""
    dropped: int = 0
    """Rows with an error, which are left out."""
    tokens: int = 0
    """Of the rows that are used, after the cut."""
    loss_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row that is used, after the cut; of a pair, both sequences together."""
    longest_whole: int = 0
    """Tokens of the longest row before any cut; of a pair, the longer sequence."""
    dropped_rows: list[int] = field(default_factory=list)
    """The first ten rows that were left out, counted from 1."""
    codes: Counter[str] = field(default_factory=Counter)
    """Rows with each finding."""
    errors: list[Violation] = field(default_factory=list)
    warnings: list[Violation] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Counts and shares, for the manifest and `--format json`."""
        kept = {"file", "max_length", "dropped_rows", "codes", "errors", "warnings", "set_aside"}
        plain = {key: value for key, value in asdict(self).items() if key not in kept}
        share = self.truncated / self.rows if self.rows else 0.0
        return {
            "max_length": self.max_length,
            **plain,
            "truncated_percent": round(100 * share, 2),
            "dropped_rows": self.dropped_rows,
            "findings": {code: self._finding(code, count) for code, count in self.codes.most_common()},
        }

    def describe(self) -> Iterator[str]:
        """For a person: rows over `max_length`, and each warning with its share."""
        if self.truncated:
            share = 100 * self.truncated / self.rows
            yield (
                f"{self.truncated:,} of {self.rows:,} rows ({share:.1f} %) have more tokens than max_length "
                f"{self.max_length:,}, the longest {self.longest_whole:,}"
            )
        for code, count in self.codes.most_common():
            if code in WARNINGS:
                yield f"{code}: {count:,} rows ({100 * count / self.rows:.1f} %)"

    def _finding(self, code: str, count: int) -> dict[str, Any]:
        severity = "warning" if code in WARNINGS else "error"
        return {"rows": count, "percent": round(100 * count / self.rows, 2), "severity": severity}


@dataclass(frozen=True)
class _Found:
    """Something that the tokenizer does to a row."""

    code: str
    message: str
    severity: Literal["error", "warning"]
    mend: str | None = None


def label_demonstrations(
    tokenizer: Any, rows: Sequence[Demonstration] | CheckedRows[Demonstration], max_length: int
) -> tuple[list[dict[str, list[int]]], Counted]:
    """The rows as TRL's SFTTrainer takes them tokenised (`input_ids`, `labels`), and what became of them.

    Raises:
        PipelineError: the tokenizer has no chat template, and a row is a conversation.
    """
    counted, labelled = _Account(tokenizer, rows, max_length), []
    for row in rows:
        found = list(counted.control_tokens(row))
        try:
            whole = label_demonstration(tokenizer, row)
        except PipelineError as error:
            counted.refused(row, found, error)
            continue
        found += _demonstration(whole, max_length)
        one = cut(whole, max_length)
        if counted.add(
            row,
            found,
            length=len(one.input_ids),
            whole=len(whole.input_ids),
            in_loss=_in_loss(one.labels),
        ):
            labelled.append({"input_ids": one.input_ids, "labels": one.labels})
    return labelled, counted.counted


def tokenize_preferences(
    tokenizer: Any, rows: Sequence[Preference] | CheckedRows[Preference], max_length: int
) -> tuple[list[Pair], Counted]:
    """The rows as TRL's DPOTrainer tokenises them, cut at `max_length`, and what became of them.

    Raises:
        PipelineError: the tokenizer has no chat template, and a row is a conversation.
    """
    counted, pairs = _Account(tokenizer, rows, max_length), []
    for row in rows:
        found = list(counted.control_tokens(row))
        try:
            whole = tokenize_sequences(tokenizer, row)
        except PipelineError as error:
            counted.refused(row, found, error)
            continue
        pair = whole.cut(max_length)
        found += _preference(tokenizer, whole, pair, max_length)
        in_loss = len(pair.chosen_ids) + len(pair.rejected_ids)
        if counted.add(
            row,
            found,
            length=2 * len(pair.prompt_ids) + in_loss,
            whole=max(len(whole.chosen), len(whole.rejected)),
            in_loss=in_loss,
        ):
            pairs.append(pair)
    return pairs, counted.counted


class _Account:
    """Keeps count over the rows of a file, one by one."""

    def __init__(self, tokenizer: Any, rows: Any, max_length: int) -> None:
        checked = rows if isinstance(rows, CheckedRows) else None
        self.counted = Counted(checked.report.file if checked else "", max_length)
        self._pointers = checked.pointers if checked else None
        self._control = ControlTokens(tokenizer)

    def control_tokens(self, row: Demonstration | Preference) -> Iterator[_Found]:
        """Markers in the row's texts; what is in plain text may be meant, so it is a warning at most."""
        plain = isinstance(row.prompt, str)
        for marker, where, structure in self._control.in_row(row):
            if structure:
                message = f"{where} holds `{shown(marker)}`, which this model reads as structure, not as text"
                yield (
                    _Found("control-token", message, "error")
                    if not plain
                    else _Found(
                        "foreign-control-token",
                        f"{message}; plain text is taken as it stands",
                        "warning",
                        "check that it is meant: the row seems to be rendered already",
                    )
                )
            else:
                message = f"{where} holds `{shown(marker)}`, a control token of other models"
                yield _Found("foreign-control-token", message, "warning")

    def refused(self, row: Demonstration | Preference, found: list[_Found], error: PipelineError) -> None:
        """A row that the chat template does not render."""
        if error.code == "no-chat-template":
            raise error
        found.append(_Found(error.code, error.message, "error", error.mend))
        self.add(row, found, length=0, whole=0, in_loss=0)

    def add(
        self, row: Demonstration | Preference, found: list[_Found], *, length: int, whole: int, in_loss: int
    ) -> bool:
        """Counts one row; says whether it is used."""
        counted = self.counted
        counted.rows += 1
        counted.truncated += whole > counted.max_length
        counted.longest_whole = max(counted.longest_whole, whole)
        counted.codes.update({one.code for one in found})
        pointer = self._pointers[counted.rows - 1] if self._pointers else ""
        for one in found:
            kept = counted.errors if one.severity == "error" else counted.warnings
            if len(kept) < _KEPT:
                mend = one.mend or TOKEN_MENDS[one.code]
                kept.append(Violation(counted.file, row.line, pointer, one.code, one.message, mend, one.severity))
        reasons = [(one.code, one.message) for one in found if one.severity == "error"]
        if reasons:
            counted.dropped += 1
            if len(counted.dropped_rows) < 10:
                counted.dropped_rows.append(counted.rows)
            counted.set_aside.append(SetAside(counted.file, row.line, pointer, reasons, _plain(row)))
            return False
        counted.used += 1
        counted.tokens += length
        counted.loss_tokens += in_loss
        counted.longest = max(counted.longest, length)
        return True


def _plain(row: Demonstration | Preference) -> dict[str, Any]:
    """The canonical row as JSON."""
    values = {name: getattr(row, name) for name in row.__slots__ if name not in ("line", "prompt_turns")}
    return {name: value for name, value in values.items() if value is not None}


def _demonstration(whole: Labelled, max_length: int) -> Iterator[_Found]:
    yield from _unlike(whole.unlike)
    ids, labels = whole.input_ids, whole.labels
    if not _in_loss(labels):
        yield _Found("nothing-in-loss", "no token of the row is in the loss", "error")
        return
    if len(ids) <= max_length:
        return
    if not _in_loss(labels[:max_length]):
        before = next(at for at, label in enumerate(labels) if label != IGNORED)
        yield _nothing_left(before, max_length)
        return
    lost = _in_loss(labels[max_length:])
    if not lost:
        return  # the template's own text behind the last answer
    # Inside an answer the cut takes the rest of it and its stop token; between two it takes whole answers.
    inside = labels[max_length - 1] != IGNORED and labels[max_length] != IGNORED
    if not (inside and lost == 1):
        yield _cut("the row", len(ids), max_length, lost)
    if inside:
        yield _stop_cut("the answer", max_length)


def _preference(tokenizer: Any, whole: Sequences, pair: Pair, max_length: int) -> Iterator[_Found]:
    prompt, start = whole.prompt_ids, whole.start
    if start < len(prompt):
        other = next(ids for ids in (whole.chosen, whole.rejected) if ids[: len(prompt)] != prompt)
        yield from _unlike((tokenizer.decode(prompt[start:]), tokenizer.decode(other[start : len(prompt)])))
    if not pair.chosen_ids and not pair.rejected_ids:
        yield _nothing_left(start, max_length)
        return
    if pair.chosen_ids == pair.rejected_ids:
        if whole.chosen == whole.rejected:
            yield _Found("equal-tokens", "`chosen` and `rejected` are the same tokens", "error")
        else:
            message = f"`chosen` and `rejected` are the same in what the cut at {max_length:,} tokens leaves of them"
            yield _Found("equal-after-cut", message, "error")
    special = special_ids(tokenizer)
    for name, ids in (("chosen", whole.chosen), ("rejected", whole.rejected)):
        stop = _stop(tokenizer, ids, start, special)
        if stop is None:
            yield _Found("no-stop-token", f"the template ends `{name}` with nothing that stops the model", "warning")
        end = len(ids) if stop is None else stop
        if max_length < end:
            yield _cut(f"`{name}` with its prompt", len(ids), max_length, len(ids) - max_length)
        if stop is not None and max_length <= stop:
            yield _stop_cut(f"`{name}`", max_length)


def _stop(tokenizer: Any, ids: list[int], start: int, special: set[int]) -> int | None:
    """Index of the special token that ends a completion: nothing but white space stands behind it."""
    at = next((at for at in range(len(ids) - 1, start - 1, -1) if ids[at] in special), None)
    return at if at is not None and not tokenizer.decode(ids[at + 1 :]).strip() else None


def _unlike(unlike: tuple[str, str] | None) -> Iterator[_Found]:
    if unlike is not None:
        alone, there = (shown(text.replace("\n", "\\n")) for text in unlike)
        message = f"the prompt alone ends with `{alone}`; with the completion behind it, `{there}` stands there"
        yield _Found("prompt-not-prefix", message, "warning")


def _nothing_left(before: int, max_length: int) -> _Found:
    message = (
        f"{before:,} tokens stand before the answer, and max_length is {max_length:,}: nothing is left in the loss"
    )
    return _Found("nothing-in-loss", message, "error")


def _cut(what: str, length: int, max_length: int, lost: int) -> _Found:
    message = f"{what} has {length:,} tokens, max_length is {max_length:,}: {lost:,} of the completion are cut off"
    return _Found("completion-cut", message, "warning")


def _stop_cut(what: str, max_length: int) -> _Found:
    return _Found("stop-cut", f"the stop token of {what} stands behind max_length {max_length:,}", "warning")


def _in_loss(labels: Iterable[int]) -> int:
    return sum(label != IGNORED for label in labels)


def require_usable(counted: Sequence[Counted], stage: str, on_invalid: str) -> None:
    """The gate in front of a stage: rows that cannot be trained on are refused, or may be left out.

    Args:
        counted: of each file of the stage.
        stage: `sft` or `dpo`.
        on_invalid: `data.on_invalid` of the experiment.

    Raises:
        PipelineErrors: rows have errors and none may be left out, or no row of a file is left.
    """
    errors: list[PipelineError] = []
    for one in counted:
        codes = {code: count for code, count in one.codes.most_common() if code not in WARNINGS}
        kinds = ", ".join(f"{code} {count:,}" for code, count in codes.items())
        if one.dropped and on_invalid == "refuse":
            errors.append(
                PipelineError(
                    f"{one.dropped:,} of {one.rows:,} rows cannot be trained on as this model's tokenizer has them "
                    f"({kinds}), and nothing was trained",
                    code="invalid-rows",
                    mend=f"train without them: `--set data.on_invalid=set-aside`{_longer(one, stage)}; `pipeline "
                    "validate EXPERIMENT` shows all",
                    file=one.file,
                    exit_code=ExitCode.WRONG,
                )
            )
            errors += [_as_error(violation) for violation in one.errors[:_FIRST_SHOWN]]
        elif not one.used:
            errors.append(
                PipelineError(
                    f"no row is left to train on ({kinds or 'the file has none'})",
                    code="nothing-to-learn",
                    mend=f"mend the rows{_longer(one, stage)}; `pipeline validate EXPERIMENT` shows what is wrong",
                    file=one.file,
                    exit_code=ExitCode.WRONG,
                )
            )
    if errors:
        raise PipelineErrors(errors)


def _longer(counted: Counted, stage: str) -> str:
    if not {"nothing-in-loss", "equal-after-cut"} & counted.codes.keys():
        return ""
    return (
        f", or raise `{stage}.max_length` (now {counted.max_length:,}; the longest row has {counted.longest_whole:,})"
    )


def _as_error(violation: Violation) -> PipelineError:
    return PipelineError(
        violation.message,
        code=violation.code,
        mend=violation.mend,
        file=violation.file,
        line=violation.line,
        pointer=violation.pointer or None,
        exit_code=ExitCode.WRONG,
    )
