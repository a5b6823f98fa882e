"""What is said when the machine fails: memory that does not suffice, a disk that is full, too small or broken."""

from __future__ import annotations

import errno
import os
import re

from pipeline.errors import ExitCode, PipelineError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
"""What the system says of a disk that is full, too small, read-only or broken."""
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
"""What torch's allocators say, of GPUs and of the CPU."""
_LOST = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe")
"""What torch's back ends say when a process that they talk to is gone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the machine's memory does not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; torch is not imported
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _MEMORY)


def machine_failure(error: BaseException, figures: str = "") -> PipelineError | None:
    """The message for a machine that failed (memory, disk, another process of the run); None for anything else.

    Args:
        error: what was raised.
        figures: what the plan says of the memory, where there is a plan.
    """
    if is_out_of_memory(error):
        cause = " ".join(str(error).split())[:200]
        return PipelineError(
            f"the memory does not suffice{figures}{f' ({cause})' if cause else ''}",
            code="out-of-memory",
            mend="set `gradient_checkpointing: true`, or lower `max_length`, `per_device_eval_batch_size` or, with "
            "several processes, `per_device_train_batch_size`; `model.dtype: bfloat16` halves the weights, "
            "`model.quantize: nf4` makes an eighth of them; `pipeline plan` says what each comes to",
            exit_code=ExitCode.MACHINE,
        )
    if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(error, RuntimeError) and _speaks_of_another(error):
        return PipelineError(
            f"another process of this run has ended ({' '.join(str(error).split())[:200]})",
            code="process-lost",
            mend="its own message says why; the same command with --resume goes on from the last checkpoint",
            exit_code=ExitCode.MACHINE,
        )
    # safetensors and torch write with their own hands, and say what the system said in their own words.
    number = re.search(r"\(os error (\d+)\)|iostream error|unexpected pos", str(error))
    if (isinstance(error, OSError) and error.errno in _DISK) or (
        number is not None and (number[1] is None or int(number[1]) in _DISK)
    ):
        return PipelineError(
            f"writing failed: {error.strerror if isinstance(error, OSError) else ' '.join(str(error).split())[:200]}",
            code="disk",
            file=error.filename if isinstance(error, OSError) else None,
            mend="free some space, or name another folder with --checkpoints",
            exit_code=ExitCode.MACHINE,
        )
    return None


def _speaks_of_another(error: RuntimeError) -> bool:
    return type(error).__name__.startswith("Dist") or any(words in str(error).lower() for words in _LOST)
