"""A row of tokens in parts, and what each of them sees: the one description that every way of attending reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    """Tokens `start` to `stop` of a row; each sees all that is in `before`, and the part itself up to its own place."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()
    """Parts further in front that they all see, from where to where, in the order of positions."""

    @property
    def length(self) -> int:
        """Tokens of the part."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """Tokens that its last token sees."""
        return self.length + sum(stop - start for start, stop in self.before)


class Row:
    """All parts of a row, and masks that its layers have in common; it lives as long as the batch.

    Args:
        parts: they stand one behind the other; those without tokens are left out.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(part for part in parts if part.length)
        self.longest = max(part.keys for part in self.parts)
        self.made: dict[Any, Any] = {}
        """What a way of attending made of the parts, by its module's name, for the layers that follow."""
        self._masks: dict[tuple[int, int, int, torch.device], torch.Tensor] = {}
        self._bounds: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def narrower(self, window: int | None) -> int | None:
        """A sliding window, if some token does not see all that stands before it."""
        return None if window is None or window >= self.longest else window

    def mask(self, part: Part, window: int | None, device: torch.device) -> torch.Tensor:
        """What the tokens of a part see of what stands before it and of the part itself.

        Args:
            part: of the row.
            window: how many positions back a token sees, itself counted; None: all.
            device: of the mask.

        Returns:
            `[1, 1, length, keys]`, True where a token is seen.
        """
        window = part.keys if window is None else min(window, part.keys)
        key = part.length, part.keys, window, device
        if key not in self._masks:
            at = torch.arange(part.keys - part.length, part.keys, device=device)[:, None]
            behind = at - torch.arange(part.keys, device=device)[None, :]
            self._masks[key] = ((behind >= 0) & (behind < window))[None, None]
        return self._masks[key]

    def bounds(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the queries of each part begin and end, and its keys, if all parts' keys stand one behind the other.

        Returns:
            Two of `[parts + 1]`, int32.
        """
        if device not in self._bounds:
            sizes = torch.tensor([[0, 0], *((part.length, part.keys) for part in self.parts)])
            queries, keys = sizes.cumsum(dim=0).to(device, torch.int32).unbind(dim=1)
            self._bounds[device] = queries.contiguous(), keys.contiguous()
        return self._bounds[device]

    def seen(self, states: torch.Tensor) -> list[list[torch.Tensor]]:
        """For each part, the runs of `states`, `[…, T, d]`, that stand before it, and its own.

        The row is split whole: slices would each give a gradient of the row's full size.
        """
        own = torch.split(states, [part.length for part in self.parts], dim=-2)
        runs = dict(zip(((part.start, part.stop) for part in self.parts), own, strict=True))
        return [[*(runs[run] for run in part.before), runs[part.start, part.stop]] for part in self.parts]
