"""What the check of one data file found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.data.audit import Audit
from pipeline.data.codes import MENDS
from pipeline.data.fingerprints import Fingerprints
from pipeline.data.near import NearDuplicates
from pipeline.data.place import Excerpt, pointer
from pipeline.data.rows import Kind
from pipeline.errors import PipelineError


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
    warning_counts: Counter[str] = field(default_factory=Counter)
    """The same of warnings."""
    separable: bool = True
    """Whether all rows could be told apart, so that training may go on without the wrong ones."""
    set_aside: int = 0
    """Wrong rows that training would go on without (`put_aside`)."""
    tokens: dict[str, Any] | None = None
    """What an experiment's tokenizer does to the rows (`tokenised.Counted`); None: not asked."""
    counts: Audit = field(default_factory=Audit, repr=False)
    """What `audit` shows in numbers."""
    prints: Fingerprints = field(default_factory=Fingerprints, compare=False, repr=False)
    """What finds a row or a prompt of the file in another one."""
    near: NearDuplicates | None = field(default=None, compare=False, repr=False)
    """What finds rows that are nearly the same in another file; None: they were not looked for."""

    @property
    def ok(self) -> bool:
        """Whether every row may be trained on; warnings do not count."""
        return self.error_count == 0

    def add_file_error(self, error: PipelineError, max_errors: int, *, in_front: bool = False) -> None:
        """Counts an error of the file as a whole and keeps it if there is room."""
        self.separable = False
        self.error_count += 1
        self.error_counts[error.code] += 1
        violation = Violation(self.file, error.line, error.pointer, error.code, error.message, error.mend)
        errors = [violation, *self.errors] if in_front else [*self.errors, violation]
        self.errors = errors[:max_errors]

    def warn(
        self, code: str, message: str, max_warnings: int, line: int | None = None, index: int | None = None
    ) -> None:
        """Counts a warning and keeps it if there is room.

        Args:
            code: one of `codes.MENDS`.
            message: the cause in one short sentence.
            max_warnings: how many are kept.
            line: where the row begins; None: it is about the whole file.
            index: of the row where the file is one array.
        """
        self.warning_counts[code] += 1
        if len(self.warnings) < max_warnings:
            at = None if line is None else "" if index is None else pointer((index,))
            self.warnings.append(Violation(self.file, line, at, code, message, MENDS[code], severity="warning"))

    def put_aside(self, max_warnings: int) -> None:
        """Makes the errors of rows warnings, where training would go on without the rows (`data.on_invalid`)."""
        assert self.separable, "rows that cannot be told apart cannot be set aside"
        self.set_aside = self.rows - self.valid
        found = [replace(error, severity="warning") for error in self.errors]
        self.warnings = (found + self.warnings)[:max_warnings]
        self.warning_counts = self.error_counts + self.warning_counts
        self.errors, self.error_count, self.error_counts = [], 0, Counter()

    def as_dict(self) -> dict[str, Any]:
        """The report as `--format json` prints it."""
        return {
            "file": self.file,
            "ok": self.ok,
            "rows": self.rows,
            "valid": self.valid,
            "set_aside": self.set_aside,
            "format": self.format,
            "kind": self.kind,
            "errors": [error.as_dict() for error in self.errors],
            "error_count": self.error_count,
            "warnings": [warning.as_dict() for warning in self.warnings],
            "audit": self.audit,
            **({} if self.tokens is None else {"tokens": self.tokens}),
        }
