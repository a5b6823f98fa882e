"""`pipeline convert`: data of any format as canonical JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.data.check import load_rows
from pipeline.data.result import Report
from pipeline.data.rows import Demonstration, Preference
from pipeline.errors import PipelineError
from pipeline.runs.files import write_atomically


class Exported(NamedTuple):
    """What was written."""

    path: Path
    rows: int
    skipped: int
    """Rows that are wrong, and not in the file."""
    report: Report


def export(
    source: Path,
    kind: Literal["demonstration", "preference"],
    out: Path,
    *,
    force: bool = False,
    skip_invalid: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Exported:
    """Writes the rows of a file, a glob, a folder or a data set as canonical JSONL, whole or not at all.

    Args:
        source: what to read.
        kind: what its rows are for.
        out: the file to write.
        force: overwrite it where it exists.
        skip_invalid: leave out rows that are wrong, instead of refusing to write any.
        columns: names of columns and the fields that they stand for.

    Raises:
        PipelineError: rows are wrong, all of them are, or `out` exists or cannot be written.
    """
    if not force and os.path.lexists(out):  # of a name that cannot be, it says no; `Path.exists` would raise
        raise PipelineError("the file exists", code="file-exists", mend="name another, or add --force", file=out)
    if not os.path.isdir(out.parent):  # noqa: PTH112 - likewise
        raise PipelineError("there is no such folder", code="no-such-folder", mend="make it first", file=out.parent)
    checked = load_rows(source, kind, set_aside=skip_invalid, columns=columns)
    if not checked.rows:
        raise PipelineError(
            "every row is wrong", code="invalid-rows", mend=f"see why with `pipeline validate {source}`", file=source
        )
    lines = [json.dumps(canonical(row), ensure_ascii=False, allow_nan=False) + "\n" for row in checked.rows]
    try:
        write_atomically(out, "".join(lines))
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        raise PipelineError(
            f"cannot be written: {cause}", code="unwritable-file", mend="check the folder's permissions", file=out
        ) from error
    return Exported(out, len(checked.rows), len(checked.set_aside), checked.report)


def canonical(row: Demonstration | Preference) -> dict[str, Any]:
    """The row in the shape that holds all of it and is read back as an equal one.

    That is one of TRL's; a conversation of which some assistant turns are not trained on is OpenAI's, with weights.
    """
    tools = {"tools": row.tools} if row.tools else {}
    if isinstance(row, Preference):
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, **tools}
    if row.messages is None:
        return {"prompt": row.prompt, "completion": row.completion}
    if cut := row.prompt_turns:
        return {"prompt": row.messages[:cut], "completion": row.messages[cut:], **tools}
    trained = row.trained_turns
    messages = [
        {**turn, "weight": 0} if trained is not None and turn["role"] == "assistant" and at not in trained else turn
        for at, turn in enumerate(row.messages)
    ]
    return {"messages": messages, **tools}
