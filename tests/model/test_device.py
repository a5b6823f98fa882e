from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.model.device import Placement, place, reuse_memory


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine: neither CUDA nor MPS, unless a test says otherwise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, device 1, that multiplies bfloat16 natively."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_auto_on_a_machine_without_a_gpu_is_cpu_in_float32() -> None:
    assert place("auto", "auto") == Placement(torch.device("cpu"), torch.float32)


def test_auto_takes_cuda_before_mps_and_bfloat16_where_it_is_native(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert place("auto", "auto") == Placement(torch.device("cuda", 1), torch.bfloat16)


def test_auto_does_not_take_bfloat16_that_a_gpu_only_emulates(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says yes for a T4 unless it is asked to leave emulation out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert place("auto", "auto").dtype == torch.float32


def test_auto_takes_mps_before_the_cpu_and_float32_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert place("auto", "auto") == Placement(torch.device("mps"), torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_named_precision_is_taken(cuda: None, name: str, dtype: torch.dtype) -> None:
    assert place("cuda", name) == Placement(torch.device("cuda", 1), dtype)


def test_a_named_device_wins_over_a_better_one(cuda: None) -> None:
    assert place("cpu", "bfloat16") == Placement(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_to_do(device: str) -> None:
    with pytest.raises(PipelineError) as caught:
        place(device, "auto")
    error = caught.value
    assert (error.code, error.pointer) == ("no-such-device", "/model/device")
    assert torch.__version__ in error.message
    assert "model.device: auto" in error.mend
    assert device.upper() in error.mend


def test_float16_is_refused_where_there_is_no_loss_scaling() -> None:
    with pytest.raises(PipelineError) as caught:
        place("cpu", "float16")
    error = caught.value
    assert (error.code, error.pointer) == ("unsupported-dtype", "/model/dtype")
    assert "bfloat16" in error.mend


def test_mixed_is_for_half_precision() -> None:
    cpu = torch.device("cpu")
    assert [Placement(cpu, dtype).mixed for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [
        False,
        True,
        True,
    ]


def test_the_cpu_is_described_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert Placement(torch.device("cpu"), torch.float32).describe() == "CPU (3 threads), float32"


def test_a_gpu_is_described_with_its_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """25,769,803,776 bytes are 24 GiB."""
    properties = SimpleNamespace(name="RTX 4090", total_memory=25_769_803_776)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    described = Placement(torch.device("cuda", 0), torch.bfloat16).describe()
    assert described == "CUDA (RTX 4090, 24 GiB), bfloat16"


def test_each_process_of_a_launcher_takes_its_own_gpu(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert place("auto", "auto").device == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(PipelineError, match="process 3 of its launcher, and the machine has 3 GPUs") as caught:
        place("cuda", "auto")
    assert caught.value.code == "no-such-device"


def test_freed_memory_is_kept_by_glibc_alone_and_only_where_nobody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ctypes
    from types import SimpleNamespace

    set_to: dict[int, int] = {}
    glibc = SimpleNamespace(mallopt=set_to.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    reuse_memory()
    assert set_to == {-3: 32 * 2**20, -1: 2**31 - 1}
    set_to.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    reuse_memory()
    assert set_to == {}
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    reuse_memory()  # another C library
