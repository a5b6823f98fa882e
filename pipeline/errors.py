"""The one exception that users see, and the exit codes of every command.

An error names its place (file, line, JSON pointer), a stable code, the cause and the mend. `cli` prints it
without a traceback; anything else that escapes is a defect of ours.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

from pipeline.redaction import hide


class ExitCode(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    WRONG = 1
    """The work found something wrong: bad data, a failed check."""
    USAGE = 2
    """Wrong usage or a wrong experiment."""
    INTERRUPTED = 3
    """Stopped on request; can be resumed."""
    MACHINE = 4
    """The machine failed: memory, disk."""


class PipelineError(Exception):
    """Something that the user can mend.

    Args:
        message: the cause, one sentence, no trailing full stop needed; what looks like a secret in it is hidden.
        code: a stable kebab-case identifier, e.g. `unknown-key`.
        mend: what to type or change.
        file, line, pointer: where; `line` counts from 1, `pointer` is RFC 6901.
        exit_code: the status the command ends with.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        mend: str,
        file: str | Path | None = None,
        line: int | None = None,
        pointer: str | None = None,
        exit_code: ExitCode = ExitCode.USAGE,
    ) -> None:
        self.message = hide(message)
        super().__init__(self.message)
        self.code = code
        self.mend = hide(mend)
        self.file = None if file is None else str(file)
        self.line = line
        self.pointer = pointer
        self.exit_code = exit_code

    @property
    def place(self) -> str:
        """`file:line pointer`, as much of it as is known; empty where nothing is."""
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return " ".join(part for part in (where, self.pointer) if part)

    def as_dict(self) -> dict[str, Any]:
        """The error as `--format json` prints it."""
        return {
            "file": self.file,
            "line": self.line,
            "pointer": self.pointer,
            "code": self.code,
            "message": self.message,
            "mend": self.mend,
            "severity": "error",
        }

    def __str__(self) -> str:
        head = f"{self.place}: {self.message}" if self.place else self.message
        return f"{head} [{self.code}]\n  {self.mend}"


class PipelineErrors(PipelineError):
    """Several errors found in one pass, so that a user mends them in one go.

    It speaks as its first error and carries all of them in `errors`.
    """

    def __init__(self, errors: list[PipelineError]) -> None:
        first = errors[0]
        super().__init__(
            first.message,
            code=first.code,
            mend=first.mend,
            file=first.file,
            line=first.line,
            pointer=first.pointer,
            exit_code=first.exit_code,
        )
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def comes_from(error: BaseException, library: str) -> bool:
    """Whether a library raised an exception, or something below it did, rather than code of ours that it called.

    Args:
        error: as it was caught.
        library: its package.
    """
    decides, place = None, error.__traceback__
    while place is not None:  # from here to where it was raised
        package = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
        decides = package if package in ("pipeline", library) else decides
        place = place.tb_next
    return decides == library
