"""What the rows of a file, each right by itself, show together: copies, contradictions, a bias."""

from __future__ import annotations

from pipeline.data.near import NearDuplicates
from pipeline.data.result import Report

_FEW_ROWS = 10


def finish(report: Report, max_warnings: int, near: NearDuplicates | None = None) -> None:
    """Draws up `format`, `audit` and the warnings of a report whose rows have all been counted.

    Args:
        report: of one file; what finds its rows and prompts in other files is kept.
        max_warnings: how many the report keeps; all are counted.
        near: what compared the same rows; None: nothing did.
    """
    counts, prints = report.counts, report.prints
    formats = list(counts.formats)
    report.format = formats[0] if len(formats) == 1 else "mixed" if formats else None
    equals = set()
    for number, first, equal in prints.repeats():
        place, earlier = prints.place(number), prints.place(first)
        if equal:
            counts.duplicate_rows += 1
            if near is not None:
                equals.add(number)
            report.warn("duplicate-row", f"the same row as at {earlier}", max_warnings, *place)
        else:
            counts.opposite_rows += 1
            message = f"prefers what the row at {earlier} rejects, and rejects what it prefers, on the same prompt"
            report.warn("opposite-preference", message, max_warnings, *place)
    report.near = near
    if near is not None:
        found = [one for one in near.found if one.number not in equals]
        counts.near_duplicates = {"compared": near.rows, "found": len(found)}
        for one in found:
            message = f"{one.similarity:.0%} the same as the row at {prints.place(one.earlier)}"
            report.warn("near-duplicate", message, max_warnings, *prints.place(one.number))
    prints.forget_opposites()
    if 0 < report.rows < _FEW_ROWS:
        count = "1 row" if report.rows == 1 else f"{report.rows} rows"
        report.warn("few-rows", f"the file has {count} only", max_warnings)
    if bias := counts.bias:
        report.warn("length-bias", bias, max_warnings)
    report.audit = {"sha256": report.sha256, **counts.as_dict()}
