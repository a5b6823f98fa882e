"""The frozen trunk computed once: what comes out of the blocks below everything that trains.

Where only the last blocks train, the blocks below are a constant of the row: policy and reference agree there, in
every epoch. Their output is kept by the row's content, in memory or in a file that is gone with the run, up to a
bound; a row beyond the bound goes through the trunk each time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipeline.model.anatomy import anatomy_of
from pipeline.training.engine.joint import Joint

Where = Literal["memory", "disk"]
_UNKNOWN_MEMORY = 4 * 2**30
"""Taken where the system does not say how much is free."""


def frozen_blocks(model: Any) -> list[nn.Module]:
    """The blocks, from the embeddings up, below the first parameter that trains; none where it lies before them.

    Args:
        model: the causal language model, adapters in place.
    """
    names = anatomy_of(model).blocks
    blocks = [model.get_submodule(name) for name in names]
    backbone = model.get_submodule(names[0].rsplit(".", 2)[0])
    parts = list(backbone.children())
    at = next(index for index, part in enumerate(parts) if list(part.children())[:1] == blocks[:1])
    behind = [*parts[at + 1 :], *([head] if (head := model.get_output_embeddings()) is not None else [])]
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    known = {id(parameter) for part in (*blocks, *behind) for parameter in part.parameters()} - embeddings
    if any(parameter.requires_grad and id(parameter) not in known for parameter in model.parameters()):
        return []
    trains = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return blocks[: trains.index(True) if True in trains else len(blocks) - 1]


def room(where: Where, folder: Path) -> int:
    """Bytes that may be taken: a quarter of the free memory, or half of the free disk."""
    if where == "disk":
        return shutil.disk_usage(folder).free // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN_MEMORY // 4


class Trunk:
    """Keeps the trunk's output for rows, and lets a forward pass begin behind it.

    Args:
        blocks: of `frozen_blocks`, at least one.
        behind: the block behind them.
        tokens: how many at most are kept.
        where: in memory, or in a file.
        folder: where that file is.
    """

    def __init__(self, blocks: list[nn.Module], behind: nn.Module, tokens: int, where: Where, folder: Path) -> None:
        self.blocks = blocks
        self._behind = behind
        self._tokens = tokens
        self._where = where
        self._folder = folder
        self._kept: torch.Tensor | None = None
        self._used = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self.passes = 0
        """How often a row went through the trunk."""

    @property
    def size(self) -> int:
        """Bytes taken by what is kept so far."""
        return 0 if self._kept is None else self._used * self._kept.shape[1] * self._kept.element_size()

    def output(self, joint: Joint, encode: Callable[[Joint], Any]) -> torch.Tensor:
        """The trunk's output for a joint row, `[1, T, width]`, without gradient.

        Args:
            joint: the row.
            encode: runs the backbone on a joint row; it is stopped behind the trunk.
        """
        pairs = list(_pairs(joint))
        missing = [at for at, (key, _) in enumerate(pairs) if key not in self._places]
        computed: dict[int, torch.Tensor] = {}
        if missing:
            self.passes += len(missing)
            hidden = self._through(_part(joint, [pairs[at][1] for at in missing], missing), encode)
            sizes = [sum(joint.sizes[at]) for at in missing]
            computed = dict(zip(missing, torch.split(hidden[0], sizes), strict=True))
            for at in missing:
                self._keep(pairs[at][0], computed[at])
        device = joint.input_ids.device
        parts = [
            computed[at] if at in computed else self._find(key).to(device, non_blocking=True)
            for at, (key, _) in enumerate(pairs)
        ]
        return torch.cat(parts)[None]

    @contextmanager
    def skipped(self, hidden: torch.Tensor) -> Iterator[None]:
        """While open, the trunk's blocks hand on `hidden` and compute nothing."""

        def hand_on(*args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden

        for block in self.blocks:
            block.forward = hand_on
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _through(self, joint: Joint, encode: Callable[[Joint], Any]) -> torch.Tensor:
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        hook = self._behind.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                encode(joint)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise RuntimeError("the block behind the trunk was not run")

    def _keep(self, key: bytes, hidden: torch.Tensor) -> None:
        if self._kept is None:
            self._kept = self._allocate(hidden)
        if self._used + len(hidden) <= self._tokens:
            self._kept[self._used : self._used + len(hidden)].copy_(hidden)
            self._places[key] = (self._used, len(hidden))
            self._used += len(hidden)

    def _find(self, key: bytes) -> torch.Tensor:
        assert self._kept is not None, "a place is in what is kept"
        start, length = self._places[key]
        return self._kept[start : start + length]

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self._tokens, like.shape[1])
        if self._where == "memory":
            return torch.empty(shape, dtype=like.dtype)
        descriptor, name = tempfile.mkstemp(prefix="trunk-", dir=self._folder)
        os.close(descriptor)
        try:
            return torch.from_file(name, shared=True, size=shape[0] * shape[1], dtype=like.dtype).view(shape)
        finally:
            Path(name).unlink()  # the mapping stays, and nothing is left behind however the run ends


class _Reached(Exception):
    """Ends a forward pass behind the trunk."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _pairs(joint: Joint) -> Iterator[tuple[bytes, slice]]:
    """For each pair a digest of what it is, and where it stands in the row."""
    start = 0
    ids = joint.input_ids[0].cpu().numpy()
    for sizes in joint.sizes:
        place = slice(start, start + sum(sizes))
        digest = hashlib.sha256(repr(sizes).encode() + ids[place].tobytes())
        yield digest.digest(), place
        start = place.stop


def _part(joint: Joint, places: list[slice], pairs: list[int]) -> Joint:
    """The joint row of some of the pairs."""
    return replace(
        joint,
        input_ids=torch.cat([joint.input_ids[:, place] for place in places], dim=1),
        position_ids=torch.cat([joint.position_ids[:, place] for place in places], dim=1),
        sizes=[joint.sizes[pair] for pair in pairs],
    )
