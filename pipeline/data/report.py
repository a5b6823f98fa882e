"""Shows what was found in data files: to a person on a terminal, or as one JSON object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipeline.data.audit import merge
from pipeline.data.place import Excerpt, printable
from pipeline.data.result import Report, Violation

_PLACES = 3
"""Places of a group that are named beside the one that is shown."""


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """What `--format json` prints: sums over the files, and under `files` each file by itself."""
    files = [report.as_dict() for report in reports]
    return {
        "ok": all(report.ok for report in reports),
        "rows": sum(report.rows for report in reports),
        "valid": sum(report.valid for report in reports),
        "set_aside": sum(report.set_aside for report in reports),
        "format": _common(report.format for report in reports),
        "kind": _common(report.kind for report in reports),
        "errors": [error for file in files for error in file["errors"]],
        "error_count": sum(report.error_count for report in reports),
        "warnings": [warning for file in files for warning in file["warnings"]],
        "audit": files[0]["audit"] if len(files) == 1 else _merged(reports),
        "files": files,
    }


def _merged(reports: Sequence[Report]) -> dict[str, Any]:
    """The files' audits added up, and which of them share prompts."""
    overlaps = [{**one, "with": report.file} for report in reports for one in report.audit.get("overlap", [])]
    return {**merge(report.counts for report in reports), **({"overlap": overlaps} if overlaps else {})}


def _common(values: Iterable[str | None]) -> str | None:
    """The one value that there is, apart from files that have none; `mixed` where there are several."""
    distinct = {value for value in values if value is not None}
    return distinct.pop() if len(distinct) == 1 else "mixed" if distinct else None


def print_reports(reports: Sequence[Report], console: Console) -> None:
    """One line a file; below it what is wrong, the most frequent first, and how to mend it."""
    for report in reports:
        _line(console, _headline(report, console))
        for line in (report.tokens or {}).get("described", ()):
            _line(console, Text(f"  {line}", "dim"))
        for code, count in report.error_counts.most_common():
            _group(console, code, count, [error for error in report.errors if error.code == code], "red")
        for code, count in report.warning_counts.items():
            _group(console, code, count, [warning for warning in report.warnings if warning.code == code], "yellow")
    if len(reports) > 1:
        right = sum(report.ok for report in reports)
        _line(console, Text(f"{right} of {_count(len(reports), 'file')} without errors", "bold"))


def _headline(report: Report, console: Console) -> Text:
    unicode = console.encoding.startswith("utf")
    if report.ok:
        line = Text(("✓ " if unicode else "ok "), "green")
        line.append(report.file, "bold")
        line.append(f"  {_count(report.rows, 'row')}")
        if report.set_aside:
            line.append(f", {report.set_aside:,} of them would be set aside", "yellow")
    else:
        line = Text(("✗ " if unicode else "!! "), "red")
        line.append(report.file, "bold")
        wrong = report.rows - report.valid
        if report.rows:
            line.append(f"  {wrong:,} of {_count(report.rows, 'row')} wrong")
        line.append(f"  {_count(report.error_count, 'error')}")
    for word in (report.kind, report.format):
        if word:
            line.append(f"  {word}", "dim")
    return line


def _group(console: Console, code: str, count: int, group: list[Violation], colour: str) -> None:
    """All findings of one code: the first one shown, some more places named, the mend once."""
    head = Text("  ")
    head.append(code, f"bold {colour}")
    if count > 1:
        head.append(f"  {count:,} times")
    if not group:
        head.append("  (past the last one that is shown)", "dim")
        _line(console, head)
        return
    _line(console, head)
    first, *others = group
    _line(console, Text(f"    {_place(first)}{first.message}"))
    if first.excerpt:
        _show(console, first.excerpt, colour)
    if others:
        named = [_other_place(other, first) for other in others[:_PLACES]]
        rest = count - 1 - len(named)
        also = ", ".join(named) + (f" and {rest:,} more" if rest > 0 else "")
        _line(console, Text(f"    also at {also}", "dim"))
    _line(console, Text(f"    mend: {first.mend}", "italic"))


def _place(violation: Violation) -> str:
    if violation.line is None:
        return ""
    return f"{violation.file}:{violation.line} {violation.pointer or ''}".rstrip() + ": "


def _other_place(violation: Violation, first: Violation) -> str:
    same = violation.pointer in (first.pointer, "", None)
    return f"line {violation.line}" + ("" if same else f" {violation.pointer}")


def _show(console: Console, excerpt: Excerpt, colour: str) -> None:
    """The piece of the line, and a caret below the value. Wide characters (Chinese, say) take two cells."""
    text, caret = excerpt
    room = max(console.width - 6, 20)
    while cell_len(text[: caret + 1]) > room and caret > 0:  # keep the value in sight on a narrow terminal
        text, caret = text[1:], caret - 1
    _line(console, Text(f"      {text}", "dim"), cut=True)
    _line(console, Text(" " * (6 + cell_len(text[:caret])) + "^", f"bold {colour}"))


def _line(console: Console, text: Text, *, cut: bool = False) -> None:
    """Prints a line; what the terminal's encoding lacks is escaped, where rich would fail."""
    if not console.encoding.startswith("utf"):
        text.plain = text.plain.encode(console.encoding, "backslashreplace").decode(console.encoding)
    text.plain = printable(text.plain)
    console.print(text, soft_wrap=not cut, no_wrap=cut, overflow="crop" if cut else None, highlight=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
