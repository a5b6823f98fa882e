"""Proves data files: every row, every violation, each with its place. Nothing here needs a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, get_args, overload

from pipeline.data.aside import SetAside
from pipeline.data.codes import MENDS, NO_FILE
from pipeline.data.columns import Columns
from pipeline.data.convert import Converted, RefusedError, convert, own_place
from pipeline.data.formats import detect_format, detect_kind
from pipeline.data.near import NearDuplicates
from pipeline.data.place import MAX_FINDINGS_PER_ROW, Finding, excerpt, line_and_column, pointer
from pipeline.data.read import Source
from pipeline.data.result import Report as Report
from pipeline.data.result import Violation as Violation
from pipeline.data.rows import Demonstration, Kind, Preference
from pipeline.data.rules import broken_rules
from pipeline.data.schema import accepts_at_once, violations
from pipeline.data.shards import combined, expand
from pipeline.data.source_row import SourceRow
from pipeline.data.strict_json import locate
from pipeline.data.suspect import finish
from pipeline.errors import ExitCode, PipelineError, PipelineErrors

Row = TypeVar("Row", Demonstration, Preference)

_FIRST_SHOWN = 5
"""How many wrong places the refusal to train names."""


@dataclass(frozen=True)
class CheckedRows(Generic[Row]):
    """The proven rows of a file: all of them, unless others were asked to be set aside."""

    rows: list[Row]
    report: Report
    set_aside: list[SetAside] = field(default_factory=list)
    """The rows that are wrong."""
    pointers: list[str] = field(default_factory=list)
    """Of each of `rows`, the JSON pointer of the row itself: empty in JSONL, from the root in a JSON array."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def check_file(
    path: Path,
    kind: str | None = None,
    *,
    max_errors: int = 100,
    near: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Report:
    """Checks every row of a file.

    Bad data never raises, whatever the bytes: a missing file, too, is a violation in the report. Memory does
    not grow with a JSONL file but for some 50 bytes a row (`fingerprints`); a JSON array is
    read whole. A row with more than 1,000 errors counts as having 1,000.

    Args:
        path: JSONL, one JSON array, a table, or the name of a data set (`hf:NAME:SPLIT`).
        kind: `demonstration` or `preference`; None: that of the first row that has one.
        max_errors: how many errors, and how many warnings, the report keeps; all are counted.
        near: whether to look for near duplicates as well, which takes some 5 kB of memory and 0.2 ms a row (`near`).
        columns: names of columns and the fields that they stand for.
    """
    compared = NearDuplicates() if near else None
    check = _Check(Source(Path(path)), kind, max_errors, near=compared, columns=columns)
    finish(check.report, max_errors, compared)
    return check.report


class Piece(NamedTuple):
    """What was found in a part of a JSONL file; lines are counted from its beginning."""

    report: Report
    """Without what only the whole file shows."""
    lines: int
    complete: bool
    """Whether the piece was read to its end."""


class Beginning(NamedTuple):
    """What the first rows of a file decide about the others."""

    kind: str | None = None
    format: str | None = None


def beginning(path: Path, kind: str | None, end: int) -> Beginning:
    """What the rows before `end` of a JSONL file decide, given the kind that was asked for."""
    for row in Source(path, 0, end).rows():
        if row.readable:
            kind = kind or detect_kind([row.value])
            format = detect_format(row.value, cast(Kind | None, kind), None)
            if isinstance(format, str):
                return Beginning(kind, format)
    return Beginning()


def check_piece(path: Path, beginning: Beginning, max_errors: int, start: int, end: int) -> Piece:
    """Checks the rows between two ends of lines of a JSONL file, as `check_file` does, but for `finish`."""
    source = Source(path, start, end)
    check = _Check(source, beginning.kind, max_errors, first=beginning.format)
    return Piece(check.report, source.lines, check.complete)


@overload
def load_rows(
    path: Path,
    kind: Literal["demonstration"],
    *,
    max_errors: int = 100,
    set_aside: bool = False,
    columns: Mapping[str, str] | None = None,
) -> CheckedRows[Demonstration]: ...
@overload
def load_rows(
    path: Path,
    kind: Literal["preference"],
    *,
    max_errors: int = 100,
    set_aside: bool = False,
    columns: Mapping[str, str] | None = None,
) -> CheckedRows[Preference]: ...
@overload
def load_rows(
    path: Path,
    kind: str,
    *,
    max_errors: int = 100,
    set_aside: bool = False,
    columns: Mapping[str, str] | None = None,
) -> CheckedRows[Any]: ...
def load_rows(
    path: Path,
    kind: str,
    *,
    max_errors: int = 100,
    set_aside: bool = False,
    columns: Mapping[str, str] | None = None,
) -> CheckedRows[Any]:
    """The canonical rows of a file, none of them unless all are right. They are held in memory.

    Args:
        path: a data file, a folder or glob of them, or the name of a data set (`hf:NAME:SPLIT`).
        kind: `demonstration` or `preference`.
        max_errors: how many errors, and how many warnings, the report keeps.
        set_aside: wrong rows are set aside instead. A file whose rows cannot all be told apart is refused still.
        columns: names of columns and the fields that they stand for.

    Raises:
        PipelineErrors: something is wrong with the file; the first error says how much, the others show the
            first places. The exit code is `WRONG`, or `USAGE` where there is no such file to read.
    """
    keep = _Kept()
    reports = []
    for shard in expand(Path(path)):
        reports.append(_Check(Source(shard), kind, max(1, max_errors), keep, columns=columns).report)
        finish(reports[-1], max_errors)
    report = reports[0] if len(reports) == 1 else combined(Path(path), reports)
    if not report.ok and not (set_aside and report.separable):
        raise _refusal(report)
    return CheckedRows(keep.rows, report, keep.set_aside, keep.pointers)


@dataclass
class _Kept:
    """What a pass over a file keeps for who wants the rows."""

    rows: list[Demonstration | Preference] = field(default_factory=list)
    pointers: list[str] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)

    def add(self, row: SourceRow, canonical: Demonstration | Preference) -> None:
        self.rows.append(canonical)
        self.pointers.append(_row_pointer(row))

    def put_aside(self, file: str, row: SourceRow, findings: list[Finding]) -> None:
        # What is wrong as a text (a key twice, say) is gone from the value.
        as_text = row.index is None and row.text and (row.findings or not row.readable)
        value = row.text if as_text else row.value
        reasons = [(finding.code, finding.message) for finding in findings]
        self.set_aside.append(SetAside(file, row.number, _row_pointer(row), reasons, value))


class _Check:
    """One pass over one file.

    Args:
        keep: where rows are put; None: they are dropped.
        near: what compares them; None: nothing does.
        first: the format that the file began with; None: this is its beginning.
        columns: names of columns and the fields that they stand for.
    """

    def __init__(
        self,
        source: Source,
        kind: str | None,
        max_errors: int,
        keep: _Kept | None = None,
        near: NearDuplicates | None = None,
        first: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        assert kind is None or kind in get_args(Kind), kind
        self.report = Report(str(source.path).encode("utf-8", "backslashreplace").decode(), cast(Kind | None, kind))
        self.complete = True
        """Whether all that was to be read was read."""
        self._max_errors = max_errors
        self._near = near
        self._first = first
        self._columns = Columns(columns or {})
        try:
            for row in source.rows():
                self._row(row, keep)
            for missing in self._columns.missing():
                # In front, since the errors of the rows follow from it.
                self.report.add_file_error(missing, max_errors, in_front=True)
        except PipelineError as error:
            self.report.add_file_error(error, max_errors)
            self.complete = False
        self.report.sha256 = source.sha256

    def _row(self, row: SourceRow, keep: _Kept | None) -> None:
        self.report.rows += 1
        findings = row.findings
        if row.readable:
            row.value = self._columns.renamed(row.value)
            if self.report.kind is None:
                self.report.kind = detect_kind([row.value])
            format = detect_format(row.value, self.report.kind, self._first)
            if self._first is None and isinstance(format, str):
                self._first = format
            converted, more = _prove(row, self.report.kind, format)
            if converted and not findings and not more:
                self.report.valid += 1
                self.report.counts.add(converted.row, str(format))
                self.report.prints.add(converted.row, row.index)
                if self._near is not None:
                    self._near.add(converted.row)
                if keep is not None:
                    keep.add(row, converted.row)
                return
            # A value that is wrong as a text (NaN, say) was not read as it stands: say no more of it.
            unread = {finding.keys for finding in findings}
            more = [self._columns.own(finding) for finding in more]
            findings = findings + [finding for finding in more if finding.keys not in unread]
        if not row.readable and row.index is not None and row.text:
            self.report.separable = False  # where the next row of an array begins cannot be told
        elif keep is not None:
            keep.put_aside(self.report.file, row, findings)
        self.report.error_count += len(findings)
        self.report.error_counts.update(finding.code for finding in findings)
        room = self._max_errors - len(self.report.errors)
        if room > 0:
            self.report.errors.extend(islice(_place(self.report.file, row, findings), room))


def _row_pointer(row: SourceRow) -> str:
    return "" if row.index is None else pointer((row.index,))


def _prove(row: SourceRow, kind: Kind | None, format: str | Finding) -> tuple[Converted | None, list[Finding]]:
    """The canonical row, where there is one, and everything that is wrong with its shape and sense."""
    if isinstance(format, Finding):
        return None, [format]
    assert kind is not None
    if not accepts_at_once(row.value, kind, format) and (
        findings := list(islice(violations(row.value, kind, format), MAX_FINDINGS_PER_ROW))
    ):
        return None, findings
    try:
        converted = convert(row.value, format, row.number)
    except RefusedError as error:
        return None, [error.finding]
    return converted, [own_place(row.value, one) for one in islice(broken_rules(converted), MAX_FINDINGS_PER_ROW)]


def _place(
    file: str, row: SourceRow, findings: list[Finding], severity: Literal["error", "warning"] = "error"
) -> Iterator[Violation]:
    """The findings of a row as violations, in the order in which they stand in the file."""
    wanted = {finding.keys for finding in findings if finding.offset is None and finding.keys is not None}
    known = locate(row.text, row.start, wanted) if wanted and row.readable and row.text else {}
    root = () if row.index is None else (row.index,)
    placed = [
        (finding.offset if finding.offset is not None else known.get(finding.keys or (), row.start), finding)
        for finding in findings
    ]
    for offset, finding in sorted(placed, key=lambda pair: pair[0]):
        line, column = line_and_column(row.text, offset, row.start, row.line) if row.line else (None, None)
        keys = finding.keys
        if keys is None and root:
            keys = ()
        yield Violation(
            file,
            line,
            None if keys is None else pointer(root + keys),
            finding.code,
            finding.message,
            finding.mend or MENDS[finding.code],
            severity,
            column if row.text else None,
            excerpt(row.text, offset) if row.text else None,
        )


def _refusal(report: Report) -> PipelineError:
    exit_code = ExitCode.USAGE if report.errors[0].code in NO_FILE else ExitCode.WRONG
    errors = [
        PipelineError(
            error.message,
            code=error.code,
            mend=error.mend,
            file=error.file,
            line=error.line,
            pointer=error.pointer,
            exit_code=exit_code,
        )
        for error in report.errors[:_FIRST_SHOWN]
    ]
    wrong = report.rows - report.valid
    if wrong:
        places = "; ".join(f"{error.place}: {error.message}" for error in errors[:3])
        more = "; …" if report.error_count > 3 else ""
        summary = PipelineError(
            f"{wrong} of {report.rows} rows are wrong, and nothing was trained: {places}{more}",
            code="invalid-rows",
            mend=f"see all of them with `pipeline validate {report.file}`",
            file=report.file,
            exit_code=exit_code,
        )
        return PipelineErrors([summary, *errors])
    return PipelineErrors(errors)
