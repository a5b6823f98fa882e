"""Proves data files: every row, every violation, each with its place. Nothing here needs a model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, get_args, overload

from pipeline.data.audit import Audit
from pipeline.data.codes import MENDS, NO_FILE
from pipeline.data.convert import Converted, RefusedError, convert
from pipeline.data.formats import detect_format, detect_kind
from pipeline.data.place import MAX_FINDINGS_PER_ROW, Excerpt, Finding, excerpt, line_and_column, pointer
from pipeline.data.read import Source, SourceRow
from pipeline.data.rows import Demonstration, Kind, Preference
from pipeline.data.rules import broken_rules
from pipeline.data.schema import violations
from pipeline.data.strict_json import locate
from pipeline.errors import ExitCode, PipelineError, PipelineErrors

Row = TypeVar("Row", Demonstration, Preference)

_FEW_ROWS = 10
_FIRST_SHOWN = 5
"""How many wrong places the refusal to train names."""


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a data file, and where."""

    file: str
    line: int | None
    """From 1; None: the file as a whole."""
    pointer: str | None
    """RFC 6901, from the row in JSONL, from the root in a JSON file; None where nothing could be read."""
    code: str
    """One of `codes.MENDS`."""
    message: str
    mend: str
    severity: Literal["error", "warning"] = "error"
    column: int | None = None
    """Characters from 1, where the offending value begins."""
    excerpt: Excerpt | None = field(default=None, compare=False, repr=False)
    """A piece of the line, to show to a person; never part of the JSON."""

    def as_dict(self) -> dict[str, Any]:
        """The violation as `--format json` prints it."""
        return {
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "pointer": self.pointer,
            "code": self.code,
            "message": self.message,
            "severity": self.severity,
            "mend": self.mend,
        }


@dataclass
class Report:
    """What one data file holds and what is wrong with it."""

    file: str
    kind: Kind | None
    """`demonstration` or `preference`: as asked for, else that of the first row that has one."""
    format: str | None = None
    """The format of the rows; `mixed` where they have several."""
    rows: int = 0
    valid: int = 0
    errors: list[Violation] = field(default_factory=list)
    """At most `max_errors` of them, in the order of the file."""
    error_count: int = 0
    warnings: list[Violation] = field(default_factory=list)
    """At most `max_errors` of them."""
    audit: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    """Of the file's bytes; empty where it could not be read to its end."""
    error_counts: Counter[str] = field(default_factory=Counter)
    """All errors by code, those included that `errors` has no place for."""

    @property
    def ok(self) -> bool:
        """Whether every row may be trained on; warnings do not count."""
        return self.error_count == 0

    def as_dict(self) -> dict[str, Any]:
        """The report as `--format json` prints it."""
        return {
            "file": self.file,
            "ok": self.ok,
            "rows": self.rows,
            "valid": self.valid,
            "format": self.format,
            "kind": self.kind,
            "errors": [error.as_dict() for error in self.errors],
            "error_count": self.error_count,
            "warnings": [warning.as_dict() for warning in self.warnings],
            "audit": self.audit,
        }


@dataclass(frozen=True)
class CheckedRows(Generic[Row]):
    """All rows of a file that was proven to have no error."""

    rows: list[Row]
    report: Report

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def check_file(path: Path, kind: str | None = None, *, max_errors: int = 100) -> Report:
    """Checks every row of a file.

    Bad data never raises, whatever the bytes: a missing file, too, is a violation in the report. Memory does
    not grow with a JSONL file but for some 150 bytes a row, by which duplicates are found; a JSON array is
    read whole. A row with more than 1,000 errors counts as having 1,000.

    Args:
        path: JSONL, or one JSON array.
        kind: `demonstration` or `preference`; None: that of the first row that has one.
        max_errors: how many errors, and how many warnings, the report keeps; all are counted.
    """
    return _Check(path, kind, max_errors).report


@overload
def load_rows(path: Path, kind: Literal["demonstration"], *, max_errors: int = 100) -> CheckedRows[Demonstration]: ...
@overload
def load_rows(path: Path, kind: Literal["preference"], *, max_errors: int = 100) -> CheckedRows[Preference]: ...
@overload
def load_rows(path: Path, kind: str, *, max_errors: int = 100) -> CheckedRows[Any]: ...
def load_rows(path: Path, kind: str, *, max_errors: int = 100) -> CheckedRows[Any]:
    """The canonical rows of a file, none of them unless all are right. They are held in memory.

    Raises:
        PipelineErrors: something is wrong with the file; the first error says how much, the others show the
            first places. The exit code is `WRONG`, or `USAGE` where there is no such file to read.
    """
    rows: list[Demonstration | Preference] = []
    report = _Check(path, kind, max(1, max_errors), rows).report
    if not report.ok:
        raise _refusal(report)
    return CheckedRows(rows, report)


class _Check:
    """One pass over one file.

    Args:
        keep: where valid rows are put; None: they are dropped.
    """

    def __init__(
        self,
        path: Path,
        kind: str | None,
        max_errors: int,
        keep: list[Demonstration | Preference] | None = None,
    ) -> None:
        assert kind is None or kind in get_args(Kind), kind
        self.report = Report(str(path).encode("utf-8", "backslashreplace").decode(), cast(Kind | None, kind))
        self._max_errors = max_errors
        self._audit = Audit()
        self._seen: dict[bytes, int] = {}
        """For each distinct row: its line, or its index in a JSON array."""
        source = Source(Path(path))
        try:
            for row in source.rows():
                self._row(row, keep)
        except PipelineError as error:
            self._file_error(error)
        self.report.sha256 = source.sha256
        self._finish()

    def _row(self, row: SourceRow, keep: list[Demonstration | Preference] | None) -> None:
        self.report.rows += 1
        findings = row.findings
        if row.readable:
            if self.report.kind is None:
                self.report.kind = detect_kind([row.value])
            format = detect_format(row.value, self.report.kind)
            converted, more = _prove(row, self.report.kind, format)
            if converted and not findings and not more:
                self.report.valid += 1
                self._audit.add(converted.row, str(format))
                self._look_for_copy(row, converted.row)
                if keep is not None:
                    keep.append(converted.row)
                return
            # A value that is wrong as a text (NaN, say) was not read as it stands: say no more of it.
            unread = {finding.keys for finding in findings}
            findings = findings + [finding for finding in more if finding.keys not in unread]
        self.report.error_count += len(findings)
        self.report.error_counts.update(finding.code for finding in findings)
        room = self._max_errors - len(self.report.errors)
        if room > 0:
            self.report.errors.extend(islice(_place(self.report.file, row, findings), room))

    def _look_for_copy(self, row: SourceRow, canonical: Demonstration | Preference) -> None:
        content = [getattr(canonical, name) for name in canonical.__slots__ if name != "line"]
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=12).digest()
        number = row.line if row.index is None else row.index
        first = self._seen.setdefault(digest, number)
        if first == number:
            return
        self._audit.duplicate_rows += 1
        if len(self.report.warnings) < self._max_errors:
            where = f"line {first}" if row.index is None else f"/{first}"
            finding = Finding("duplicate-row", f"the same row as at {where}")
            self.report.warnings.extend(_place(self.report.file, row, [finding], "warning"))

    def _file_error(self, error: PipelineError) -> None:
        self.report.error_count += 1
        self.report.error_counts[error.code] += 1
        if len(self.report.errors) < self._max_errors:
            violation = Violation(self.report.file, error.line, error.pointer, error.code, error.message, error.mend)
            self.report.errors.append(violation)

    def _finish(self) -> None:
        report = self.report
        formats = list(self._audit.formats)
        report.format = formats[0] if len(formats) == 1 else "mixed" if formats else None
        report.audit = {"sha256": report.sha256, **self._audit.as_dict()}
        if 0 < report.rows < _FEW_ROWS and len(report.warnings) < self._max_errors:
            count = "1 row" if report.rows == 1 else f"{report.rows} rows"
            message = f"the file has {count} only"
            mend = MENDS["few-rows"]
            report.warnings.append(Violation(report.file, None, None, "few-rows", message, mend, severity="warning"))


def _prove(row: SourceRow, kind: Kind | None, format: str | Finding) -> tuple[Converted | None, list[Finding]]:
    """The canonical row, where there is one, and everything that is wrong with its shape and sense."""
    if isinstance(format, Finding):
        return None, [format]
    assert kind is not None
    findings = list(islice(violations(row.value, kind, format), MAX_FINDINGS_PER_ROW))
    if findings:
        return None, findings
    try:
        converted = convert(row.value, format, row.line)
    except RefusedError as error:
        return None, [error.finding]
    return converted, list(islice(broken_rules(converted), MAX_FINDINGS_PER_ROW))


def _place(
    file: str, row: SourceRow, findings: list[Finding], severity: Literal["error", "warning"] = "error"
) -> Iterator[Violation]:
    """The findings of a row as violations, in the order in which they stand in the file."""
    wanted = {finding.keys for finding in findings if finding.offset is None and finding.keys is not None}
    known = locate(row.text, row.start, wanted) if wanted and row.readable else {}
    root = () if row.index is None else (row.index,)
    placed = [
        (finding.offset if finding.offset is not None else known.get(finding.keys or (), row.start), finding)
        for finding in findings
    ]
    for offset, finding in sorted(placed, key=lambda pair: pair[0]):
        line, column = line_and_column(row.text, offset, row.start, row.line)
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
