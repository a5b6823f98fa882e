"""Micro-batches as a matter of memory alone: however an optimizer step is cut into them, it is the same step.

TRL's SFTTrainer divides each micro-batch's sum by the tokens of the whole step, so that any cut gives the same
gradient. Its DPOTrainer takes the mean of each micro-batch's mean, which is the mean over pairs only while all are of
one size: the last step of an epoch need not be. And where the memory does not hold a micro-batch, Transformers can
only start the whole training again with a smaller one (`auto_find_batch_size`), which reorders the rows; here the
step is done again in halves, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.machine import is_out_of_memory
from pipeline.model.device import give_memory_back

ROWS = "rows_of_batch"
"""The key under which a training batch carries the rows that it was made of."""


class Rows:
    """Rows of the dataset; not a list, so that nothing on the way to the step looks into it for tensors."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.counts: list[int] | None = None
        """How many rows each process has, where these are not as many as in every other; one that has none computes
        a row that counts for nothing."""

    def of_all(self, processes: int) -> int:
        """Rows of this micro-batch in all processes together."""
        return len(self.rows) * processes if self.counts is None else sum(self.counts)


@dataclass
class KeepRows:
    """A collator whose batches carry their rows along, so that they can be cut and collated again."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """The batch of `rows`, and the rows."""
        return {**self.collate(rows), ROWS: Rows(rows)}


@contextmanager
def gathering_own_rows(accelerator: Any, counts: list[int] | None) -> Iterator[None]:
    """While open, what is gathered from all processes is of `counts` rows of each, in their order.

    Accelerate gathers as many from each, so the shares are filled up on the way. A scalar, which is a sum over rows,
    is 0 of a process that has none.

    Args:
        accelerator: the trainer's.
        counts: rows of each process; None: all have as many, and nothing changes.
    """
    if counts is None:
        yield
        return
    gather, own, most = accelerator.gather, counts[accelerator.process_index], max(counts)

    def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0:
            everyones: torch.Tensor = gather(tensor if own else torch.zeros_like(tensor))
            return everyones
        filled = torch.cat([tensor[:own], tensor.new_zeros((most - own, *tensor.shape[1:]))])
        shares = gather(filled).split(most)
        return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])

    accelerator.gather = accelerator.gather_for_metrics = gather_rows
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


class MicroBatches:
    """Goes in front of a TRL trainer: weighs micro-batches by what they hold, and halves those that do not fit."""

    mean_over_rows = False
    """Whether the loss of a micro-batch is a mean over its rows, to be weighed by their number (DPO)."""
    say: Callable[[str], None] = print
    """Tells the user one line."""

    pieces = 1
    """Into how many parts each micro-batch is cut."""
    _step: list[dict[str, Any]]
    _done = 0
    _logged: Mapping[str, int]
    _tokens = 0

    def get_train_dataloader(self: Any) -> Any:
        """TRL's, with the rows in each batch."""
        collate = self.data_collator
        self.data_collator = KeepRows(collate)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collate

    def get_batch_samples(self: Any, *args: Any) -> Any:
        """Transformers' own; remembers the micro-batches of the step that begins, and what was logged before it."""
        samples, items = super().get_batch_samples(*args)  # type: ignore[misc]
        self._step, self._done = samples, 0
        self._logged = {name: len(values) for name, values in self._metrics["train"].items()}
        self._tokens = self._total_train_tokens
        return samples, items

    def _get_num_items_in_batch(self: Any, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Transformers' count of the tokens in a step, after taking out what the last one of an epoch repeats."""
        state, args = self.accelerator.gradient_state, self.args
        repeats = args.world_size > 1 and state.end_of_dataloader and not args.dataloader_drop_last
        if repeats and batch_samples and args.train_sampling_strategy != "batch_rebalance":
            # Accelerate's own count of it (`state.remainder`) is gone where a resumed epoch skips what it has done.
            remainder = len(self.train_dataset) % (self._train_batch_size * args.world_size)
            if remainder:
                for batch in batch_samples:
                    batch[ROWS].counts = [len(batch[ROWS].rows)] * args.world_size
                batch_samples[-1] = self._own_part(batch_samples[-1], remainder)
        return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]

    def _own_part(self: Any, batch: dict[str, Any], remainder: int) -> dict[str, Any]:
        """The rows of an epoch's last batch that are this process's: Accelerate fills it up with the epoch's first.

        Args:
            batch: as the loader gave it.
            remainder: rows that are left for all processes together.
        """
        rows, args = batch[ROWS].rows, self.args
        counts = [min(max(remainder - at * len(rows), 0), len(rows)) for at in range(args.world_size)]
        own = counts[args.process_index]
        part = KeepRows(self.data_collator)(rows[: max(own, 1)])
        part[ROWS].counts = counts
        if own == 0 and "labels" in part:  # the others wait for this process's gradients all the same
            part["labels"].fill_(-100)
        return part

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, forward and backward; in smaller parts, with all before it in this step, if it must be.

        Raises:
            RuntimeError: the memory does not hold one row, or there are several processes, which would have to agree.
        """
        todo = [inputs]
        while True:
            try:
                for batch in todo:
                    loss = self._in_pieces(model, batch, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as error:
                largest = max(len(batch[ROWS].rows) for batch in self._step)
                if not is_out_of_memory(error) or self.args.world_size > 1 or self.pieces >= largest:
                    raise
            # Outside of `except`, whose traceback would keep the tensors of the failed pass alive.
            self.pieces *= 2
            self.say(
                f"step {self.state.global_step + 1} did not fit in the memory: from here on each micro-batch is cut in "
                f"{self.pieces} (at most {-(-largest // self.pieces)} rows), the batch of a step stays the same"
            )
            give_memory_back()
            # What the failed pass left in the gradients cannot be told from what earlier micro-batches put there: the
            # whole step is done again.
            model.zero_grad()
            self._forget_metrics()
            todo = [*self._step[: self._done], inputs]
        self._done += 1
        return loss  # type: ignore[no-any-return]

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss of a micro-batch, weighed so that those of a step add up to the mean over its rows."""
        rows = inputs.pop(ROWS, None)
        with gathering_own_rows(self.accelerator, None if rows is None else rows.counts):
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if rows is None or not self.mean_over_rows:
            return loss
        # `training_step` divides by the number of micro-batches, and gradients are means over the processes.
        parts, processes = self.current_gradient_accumulation_steps, self.args.world_size
        own = len(rows.rows) if rows.counts is None else rows.counts[self.args.process_index]
        in_step = sum(batch[ROWS].of_all(processes) for batch in self._step)
        weight = own * parts * processes / in_step
        return loss if weight == 1 else loss * weight

    def _in_pieces(self: Any, model: Any, batch: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch, cut in `pieces` parts of equal size or nearly so.

        Returns:
            The sum of their losses.
        """
        if self.pieces == 1:
            return super().training_step(model, batch, num_items_in_batch)  # type: ignore[misc, no-any-return]
        rows = batch[ROWS].rows
        steps = self.current_gradient_accumulation_steps
        size = -(-len(rows) // self.pieces)
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        losses = []
        try:
            # Both TRL's auxiliary loss and Transformers' mean are shares of the parts that there are.
            self.current_gradient_accumulation_steps = steps * len(parts)
            collate = KeepRows(self.data_collator)
            for part in parts:
                losses.append(super().training_step(model, collate(part), num_items_in_batch))  # type: ignore[misc]
        finally:
            self.current_gradient_accumulation_steps = steps
        return torch.stack(losses).sum()

    def _forget_metrics(self: Any) -> None:
        """Takes back what this step added to TRL's metrics."""
        metrics = self._metrics["train"]
        for name in list(metrics):
            del metrics[name][self._logged.get(name, 0) :]
            if not metrics[name]:
                del metrics[name]
        self._total_train_tokens = self._tokens
