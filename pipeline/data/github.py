"""Findings as GitHub shows them beside the lines of a change: one workflow command a finding, on stdout.

https://docs.github.com/actions/reference/workflow-commands-for-github-actions: in a message `%`, carriage returns and
line feeds are escaped, in a property `:` and `,` as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.place import printable
from pipeline.data.result import Report
from pipeline.errors import PipelineError


def annotation_lines(reports: Sequence[Report]) -> Iterator[str]:
    """A line for each error and each warning that the reports keep, and one a file for those that they only count."""
    for report in reports:
        for found in (*report.errors, *report.warnings):
            where = f" {found.pointer}" if found.pointer else ""
            message = f"{found.message}{where}: {found.mend}"
            yield annotation(found.severity, message, found.code, found.file, found.line, found.column)
        kept, counted = len(report.errors) + len(report.warnings), report.error_count + report.warning_counts.total()
        if counted > kept:
            yield annotation("notice", f"{counted - kept:,} more findings are not shown", "not-shown", report.file)


def error_annotation(error: PipelineError) -> str:
    """The line for an error that is not about a data file."""
    return annotation("error", f"{error.message}: {error.mend}", error.code, error.file, error.line)


def annotation(
    severity: str, message: str, title: str, file: str | None = None, line: int | None = None, column: int | None = None
) -> str:
    """One workflow command, without the line's end."""
    properties = {
        "file": None if file is None else _relative(file),
        "line": line,
        "col": column,
        "title": title,
    }
    shown = ",".join(f"{key}={_escaped(str(value), ':,')}" for key, value in properties.items() if value is not None)
    return f"::{severity} {shown}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    return "".join(f"%{ord(one):02X}" if one in "%\r\n" + more else printable(one) for one in text)


def _relative(file: str) -> str:
    """From the current folder, the root of the repository, where the file is inside it: others are not shown."""
    path = Path(file)
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else file
