"""One name for many files: a glob, or a folder of shards."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.hub import is_hub
from pipeline.data.result import Report

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
PACKED = (".gz", ".zst")
_NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside its shards."""


def expand(path: Path) -> list[Path]:
    """The files that `path` stands for, in the order of their names; `path` itself where it stands for none or one.

    A folder stands for the data files directly in it, known by their suffixes; a name with `*`, `?` or `[` that is no
    file's own name for those it matches (`**` goes into folders). Hidden files never count.
    """
    if is_hub(path):
        return [path]
    try:
        if path.is_dir():
            return sorted(file for file in path.iterdir() if _is_data(file)) or [path]
        if glob.has_magic(str(path)) and not path.exists():
            matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - takes `**` whole
            return sorted(match for match in matches if match.is_file()) or [path]
    except (OSError, ValueError):  # the reader will say what is wrong with it
        pass
    return [path]


def _is_data(file: Path) -> bool:
    name = file.name.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return name.endswith(SUFFIXES) and not name.startswith(".") and name not in _NOT_ROWS and file.is_file()


def combined(path: Path, reports: Sequence[Report]) -> Report:
    """One report over shards: their sums, and their errors, each of which names its own file.

    The hash is that of the hashes of the shards, in hexadecimal, one after another.
    """
    whole = Report(str(path), reports[0].kind)
    formats = {report.format for report in reports if report.format}
    whole.format = formats.pop() if len(formats) == 1 else "mixed" if formats else None
    for report in reports:
        whole.rows += report.rows
        whole.valid += report.valid
        whole.separable &= report.separable
        whole.errors += report.errors
        whole.warnings += report.warnings
        whole.error_count += report.error_count
        whole.error_counts.update(report.error_counts)
        whole.warning_counts.update(report.warning_counts)
    if all(report.sha256 for report in reports):
        whole.sha256 = hashlib.sha256("".join(report.sha256 for report in reports).encode()).hexdigest()
    whole.audit = {"sha256": whole.sha256, "shards": {report.file: report.sha256 for report in reports}}
    return whole
