"""Which device and precision a run uses, and how that is said."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import PipelineError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


@dataclass(frozen=True)
class Placement:
    """Where the model lives and in which precision its base weights are held."""

    device: torch.device
    dtype: torch.dtype

    @property
    def mixed(self) -> bool:
        """Whether half-precision base weights train under autocast, with float32 trainable weights."""
        return self.dtype != torch.float32

    def describe(self) -> str:
        """One line for a person: `CPU (2 threads), float32`."""
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            where = f"CUDA ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
        elif self.device.type == "mps":
            where = "MPS (Apple GPU)"
        else:
            where = f"CPU ({torch.get_num_threads()} threads)"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}"


def place(device: str, dtype: str) -> Placement:
    """The placement for `model.device` and `model.dtype`, each possibly `auto`.

    `auto` takes CUDA, else MPS, else the CPU; bfloat16 where a GPU multiplies it natively, float32 elsewhere
    (on a CPU bfloat16 puts visible noise into the loss, so it is a choice, not a default). Of several processes on a
    machine each takes the GPU that its launcher numbered it for.

    Raises:
        PipelineError: the named device is not there, or the precision does not train on it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, there in available.items() if there) if device == "auto" else device
    if not available[kind]:
        raise PipelineError(
            f"`model.device: {kind}` is asked for, but torch {torch.__version__} sees no such device",
            code="no-such-device",
            pointer="/model/device",
            mend=f"use `model.device: auto`, or install a torch build that supports {kind.upper()}",
        )
    chosen = torch.device(kind, _own_gpu()) if kind == "cuda" else torch.device(kind)
    if dtype == "auto":
        native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return Placement(chosen, torch.bfloat16 if native else torch.float32)
    if dtype == "float16" and kind != "cuda":
        raise PipelineError(
            f"float16 does not train on {kind.upper()}: it needs loss scaling, which only CUDA has",
            code="unsupported-dtype",
            pointer="/model/dtype",
            mend="use `model.dtype: auto`, `float32` or `bfloat16`",
        )
    return Placement(chosen, {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype])


def give_memory_back() -> None:
    """Frees what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reuse_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    glibc takes every block above a bound that moves up to 32 MiB from the kernel and gives it back at once, so that
    each step of a training on the CPU waits for fresh pages to be zeroed. (`mallopt`, M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD.) A variable of the environment that says otherwise stays in force.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, size in ((_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        set_option(option, size)


def _own_gpu() -> int:
    """The GPU of this process: launchers such as torchrun number theirs in `LOCAL_RANK`."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return torch.cuda.current_device()
    if int(rank) >= torch.cuda.device_count():
        raise PipelineError(
            f"this is process {rank} of its launcher, and the machine has {torch.cuda.device_count()} GPUs",
            code="no-such-device",
            pointer="/model/device",
            mend="start as many processes as there are GPUs",
        )
    return int(rank)


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on `device`; None where the system does not say.

    On a CPU the memory is shared by the processes that a launcher started on the machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(placement: Placement) -> int:
    """The most memory used so far, in bytes: the GPU's, or the process's on a CPU."""
    if placement.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(placement.device))
    try:  # what `getrusage` says on Linux counts the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
