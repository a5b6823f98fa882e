"""What one training step holds in memory, counted by running it on tensors that have shapes and no storage.

The model's own forward and backward run under PyTorch's FakeTensorMode, which computes shapes and dtypes only, and
every storage is counted from its birth to its death. So dropout masks, casts under autocast, the attention kernel's
choice, gradient checkpointing and whatever else a block saves for its backward are what they are in training, for any
architecture, and there is no formula to keep in step with the libraries. Kernels' own scratch memory is not seen.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from pipeline.training.engine.attention import NAME
from pipeline.training.engine.head import compact_head
from pipeline.training.engine.joint import Joint
from pipeline.training.engine.linear import join_products
from pipeline.training.engine.padding_free import SEGMENTS, by_row
from pipeline.training.engine.short import attending, own_masks


@dataclass(frozen=True)
class Batch:
    """The largest batch of a stage."""

    sequences: int
    """A preference pair is two."""
    length: int
    """Tokens of its longest sequence, to which the others are padded."""
    positions: int
    """Positions in the loss, over all its sequences."""
    rows: tuple[tuple[int, ...], ...] = ()
    """As the engine computes it, without padding: of each demonstration its tokens; of each pair those that both
    completions share, and those of each branch (`engine.joint`). Empty: it is padded."""

    @property
    def tokens(self) -> int:
        """That the model runs on."""
        return sum(sum(row) for row in self.rows) if self.rows else self.sequences * self.length

    def padded(self) -> Batch:
        """The same batch as TRL computes it."""
        return replace(self, rows=())


@dataclass(frozen=True)
class StepBytes:
    """Bytes beyond weights, their gradients and the optimizer's state."""

    saved: int
    """What the forward pass through the blocks keeps for the backward pass."""
    head: int
    """The most that the head takes on top of it."""
    peak: int
    """The most that is alive at once."""


def trace_step(
    policy: Any,
    batch: Batch,
    *,
    autocast: torch.dtype | None,
    checkpointing: dict[str, Any] | None,
    outputs: tuple[str, ...],
    triton: bool,
) -> StepBytes:
    """Runs forward and backward of one batch without storage.

    The attention kernel is the CPU's choice, which like CUDA's keeps one number a row in place of the attention
    matrix. DPO's reference does not run in a step: its log-probabilities are computed before.

    Args:
        policy: a PEFT model on the meta device, in training mode; its weights are replaced.
        batch: its shape.
        autocast: half precision of a step; None: there is no autocast.
        checkpointing: settings of gradient checkpointing as Transformers takes them; None: it is off.
        outputs: what TRL's head computes for each position.
        triton: whether TRL's head runs its Triton kernels (CUDA) or tensor operations.
    """
    if checkpointing is not None:
        settings = dict(checkpointing)
        beside = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
        policy.enable_input_require_grads()
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs=settings or None, **beside)
    causal_lm = policy.get_base_model()
    if "flash" in str(causal_lm.config._attn_implementation):
        causal_lm.set_attn_implementation("sdpa")  # keeps the same, and runs without a GPU

    own = "eager" if causal_lm.config._attn_implementation == "eager" else "sdpa"
    with _quiet(), own_masks(), _attention_for(causal_lm, batch), FakeTensorMode():
        _give_fake_storage(policy)
        join_products(policy, rounds=False)
        inputs, source = _inputs(batch, own)
        known = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        with _LiveBytes([*policy.parameters(), *policy.buffers(), *known, source]) as counted:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                states: torch.Tensor = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
            if "joint" in inputs:
                states = states[0].index_select(0, source).view(batch.sequences, batch.length, -1)
            saved = counted.live
            peaks = [counted.lap()]
            head = policy.get_output_embeddings()
            if triton:
                at_head = _triton_head(states, head, batch.positions, autocast)
            else:
                with compact_head(torch.device("cpu")):
                    _head(states.detach(), head, batch.positions, autocast, outputs)
                at_head = counted.lap() - saved
            torch.autograd.backward(states, torch.zeros_like(states))
            peaks += [saved + at_head, counted.lap()]
    return StepBytes(saved, at_head, max(peaks))


def _attention_for(causal_lm: Any, batch: Batch) -> AbstractContextManager[Any]:
    """Lets a model attend as the engine does to this batch: by row, by pair, or as it would by itself."""
    if not batch.rows:
        return nullcontext()
    return attending(causal_lm, SEGMENTS if len(batch.rows[0]) == 1 else NAME, instead_of=None)


def _inputs(batch: Batch, own: str) -> tuple[dict[str, Any], torch.Tensor]:
    """What the backbone is given, and where in a joint row each position of TRL's batch is computed."""
    source = torch.zeros(batch.sequences * batch.length, dtype=torch.long)
    if not batch.rows:
        ids = torch.zeros(batch.sequences, batch.length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, source
    ids = torch.zeros(1, batch.tokens, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
    if len(batch.rows[0]) == 1:
        return inputs | by_row([length for (length,) in batch.rows], own), source
    sizes = [(shared, chosen, rejected) for shared, chosen, rejected in batch.rows]
    repeated = torch.zeros(len(sizes), batch.length - 1, dtype=torch.bool)
    joint = Joint(ids, inputs["position_ids"], sizes, source, repeated)
    # Of four dimensions, as `SharedPrompt` gives it, so that the model makes no mask of its own.
    return inputs | {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool), "joint": joint}, source


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that is made while it is open, until it is freed.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        # Gradients are counted by the optimizer's side of the account.
        self._known |= {tensor.grad.untyped_storage()._cdata for tensor in known if tensor.grad is not None}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def lap(self) -> int:
        """The most that was alive since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _give_fake_storage(policy: nn.Module) -> None:
    """Moves a model from the meta device to the CPU of the fake mode that is open, with a gradient where one is due."""
    made: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                    if parameter.requires_grad:
                        made[id(parameter)].grad = torch.zeros_like(fake)
                module._parameters[name] = made[id(parameter)]  # a tied weight stays one
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _head(
    states: torch.Tensor, head: Any, positions: int, autocast: torch.dtype | None, outputs: tuple[str, ...]
) -> None:
    """TRL's head, forward and backward, on `positions` of `states` `[B, T, H]`."""
    states.requires_grad_()
    where = torch.zeros(positions, dtype=torch.long)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logps = trl_utils._ChunkedLogProbFunction.apply(
            states.flatten(0, 1)[where], head.weight, head.bias, where, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
            outputs,
        )[0]  # fmt: skip
    torch.autograd.backward(logps, torch.ones_like(logps))


def _triton_head(states: torch.Tensor, head: Any, positions: int, autocast: torch.dtype | None) -> int:
    """Bytes of TRL's head on Triton, from `ChunkedLogProbFunction.backward` of TRL 1.16."""
    dtype = autocast or states.dtype
    weight: torch.Tensor = head.weight
    tile = min(positions, TOKEN_CHUNK_SIZE) * _CHUNKED_LOGPROB_CHUNK_SIZE * dtype.itemsize
    scored = positions * states.shape[-1] * (states.element_size() + 4)  # the states in the loss; their gradient
    gradient = states.numel() * states.element_size()  # scattered back to all positions
    cast = min(_CHUNKED_LOGPROB_CHUNK_SIZE, weight.shape[0]) * weight.shape[1] * dtype.itemsize
    total: int = tile + scored + gradient
    if weight.dtype != dtype:
        total += cast
    if weight.requires_grad:
        total += weight.numel() * 4
    return total


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps PyTorch from logging an operation that has no fake form: the caller says it in its own words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
