"""Attention over the parts of a row in one call of a kernel that this machine may not have.

A stand-in says in plain operations what FlashAttention documents; where there is a GPU, the kernel itself is held too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.training.engine import attention, varlen
from pipeline.training.engine.attention import attend_in_parts
from pipeline.training.engine.parts import Row
from pipeline.training.engine.varlen import attend_in_one_call, takes
from tests.training.engine.test_blocks import LAYER, LAYOUTS, allowed, tensors
from tests.training.engine.test_shared_prompt import FRONTED, PAIRS, hold_equal
from tests.training.engine.test_shared_prompt import make_trainer as make_trainer

WINDOWS = (None, 3, 9, 100)


class Flash:
    """FlashAttention for sequences of unequal length, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
        assert window_size[1] == 0
        outputs = []
        sequences = [torch.split(states, bounds.diff().tolist()) for states, bounds in
                     ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))]  # fmt: skip
        for one in zip(*sequences, strict=True):
            asks, answers, values = (states.transpose(0, 1)[None] for states in one)
            # The last query stands at the last key; `left` keys before its own are seen, all where it is -1.
            behind = torch.arange(len(one[0]))[:, None] + len(one[1]) - len(one[0]) - torch.arange(len(one[1]))
            mask = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] == -1))
            output = torch.nn.functional.scaled_dot_product_attention(
                asks, answers, values, mask, scale=scale, enable_gqa=enable_gqa
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """The stand-in, taken wherever the kernel would be."""
    stand_in = Flash()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(attention.blocks, "takes", lambda *args, **kwargs: False)
    monkeypatch.setattr(attention.varlen, "takes", lambda *args, **kwargs: True)
    return stand_in


def gradients(output: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.arange(output.numel(), device=output.device).view(output.shape).cos()
    return [output, *torch.autograd.grad((output * weights).sum(), given)]


def within(window: int | None, layout: str) -> torch.Tensor:
    """What each token sees, where a window counts positions: those of what stands before a part, and its own."""
    seen = allowed(LAYOUTS[layout])
    for at, row in enumerate(seen[0, 0]):
        places = row.nonzero().flatten()
        if window is not None:
            seen[0, 0, at, places[: max(len(places) - window, 0)]] = False
    return seen


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_values_and_gradients_are_sdpas(flash: Flash, layout: str, window: int | None, scaling: float | None) -> None:
    row = Row(LAYOUTS[layout])
    length = row.parts[-1].stop
    given = tensors(length)
    more = {"scaling": scaling, "sliding_window": window}
    own = gradients(attend_in_parts(LAYER, *given, row, **more), given)
    assert flash.calls == 1
    given = tensors(length)
    stock = gradients(sdpa_attention_forward(LAYER, *given, within(window, layout), scaling=scaling)[0], given)
    for one, other in zip(own, stock, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("pairs", [PAIRS, FRONTED], ids=["pairs", "fronted"])
def test_a_joint_row_goes_in_one_call_a_layer(
    flash: Flash, family: str, pairs: Any, make_trainer: Callable[..., Any]
) -> None:
    hold_equal(make_trainer(family), pairs)
    assert flash.calls == 2 * 2  # layers of the policy and of the reference


def test_the_call_is_one_that_torch_takes() -> None:
    """Shapes only, on the kernel's own description of itself: names, types and forms of all that is handed over."""
    row = Row(LAYOUTS["pairs"])
    given = [states[..., :6].bfloat16().to("meta").detach().requires_grad_() for states in tensors(26)]
    for window in WINDOWS:
        output = attend_in_one_call(given[0], given[1], given[2], row, 0.3, window)
        assert (output.shape, output.dtype) == ((1, 26, 4, 6), torch.bfloat16)
        shapes = [gradient.shape for gradient in torch.autograd.grad(output.sum(), given)]
        assert shapes == [states.shape for states in given]


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"values": torch.float16}, False),
        ({"width": 12}, False),
        ({"width": 264}, False),
        ({"device": "cpu"}, False),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.4"}, False),
        ({"dropout": 0.1}, False),
        ({"softcap": 30.0}, False),
        ({"is_causal": False}, False),
        ({"sliding_window": 8}, True),
    ],
)
def test_only_what_the_kernel_does_is_asked_of_it(
    changes: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability, hip = changes.pop("capability", (8, 0)), changes.pop("hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(varlen, "_keeps_its_word", lambda *asked: True)
    device = torch.device(changes.pop("device", "cuda"))
    dtype = changes.pop("dtype", torch.bfloat16)
    own = SimpleNamespace(shape=(1, 4, 9, changes.pop("width", 64)), device=device, dtype=dtype)
    values = SimpleNamespace(**{**vars(own), "dtype": changes.pop("values", dtype)})
    given: Any = own, own, values
    assert takes(LAYER, *given, **changes) == taken


class TopLeft(Flash):
    """A kernel that puts the first query at the first key."""

    def __call__(self, *given: Any, **more: Any) -> torch.Tensor:
        turned = [states.flip(0) for states in given[:3]]
        bounds = [at[-1] - at.flip(0) for at in given[3:5]]
        return super().__call__(*turned, *bounds, *given[5:], **more).flip(0)


class Detached(Flash):
    """A kernel whose backward pass has no gradient for values."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return super().__call__(query, key, 0 * value + value.detach(), *rest, **more)


class Missing(Flash):
    """A build without the kernel."""

    def __call__(self, *given: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("Torch was not compiled with flash attention")


@pytest.mark.parametrize("kernel", [TopLeft(), Detached(), Missing()], ids=lambda kernel: type(kernel).__name__)
def test_a_kernel_that_does_otherwise_is_told_and_left(kernel: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = torch.device("cpu"), torch.bfloat16, (4, 2, 8)
    monkeypatch.setattr(varlen, "varlen_attn", Flash())
    varlen._keeps_its_word.cache_clear()
    assert varlen._keeps_its_word(*asked)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    varlen._keeps_its_word.cache_clear()
    with pytest.warns(UserWarning, match="attention goes part by part"):
        assert not varlen._keeps_its_word(*asked)
    varlen._keeps_its_word.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that CUDA drives")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_kernel_does_as_its_stand_in(layout: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(LAYOUTS[layout])
    length = row.parts[-1].stop
    torch.manual_seed(0)
    whole = [torch.randn(1, heads, length, 64).bfloat16() for heads in (4, 2, 2)]
    given = [states.cuda().requires_grad_() for states in whole]
    assert takes(LAYER, given[0], given[1], given[2])
    own = gradients(attend_in_one_call(given[0], given[1], given[2], row, None, window), given)
    monkeypatch.setattr(varlen, "varlen_attn", Flash())
    exact = [states.float().requires_grad_() for states in whole]
    plain = gradients(attend_in_one_call(exact[0], exact[1], exact[2], Row(LAYOUTS[layout]), None, window), exact)
    for one, other in zip(own, plain, strict=True):
        assert torch.allclose(one.float().cpu(), other, atol=5e-2, rtol=5e-2)


def test_the_stand_in_takes_what_the_kernel_takes() -> None:
    import inspect

    kernel = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(Flash.__call__).parameters.items():
        if name != "self":
            assert kernel[name].kind == parameter.kind
