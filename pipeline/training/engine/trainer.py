"""TRL's DPOTrainer on pairs that come tokenised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer

from pipeline.data.tokens import common_prefix
from pipeline.model.anatomy import anatomy_of
from pipeline.training.engine.head import log_probs_alone
from pipeline.training.engine.joint import joint_sizes
from pipeline.training.engine.micro_batches import ROWS, MicroBatches
from pipeline.training.engine.rates import split_learning_rates
from pipeline.training.engine.reference import COLUMNS, KeptReference
from pipeline.training.engine.shared_prompt import SharedPrompt
from pipeline.training.engine.trial import trial_rows, window_of
from pipeline.training.engine.trunk import Trunk, Where, frozen_blocks, room

_TRIAL_PAIRS = 2
"""On how many pairs a faster path is held against TRL's before it is taken; the proof goes on to hold it on more."""
_TRIAL_TOKENS = 16
"""Of how many tokens of prompt and completion each, where no window is to be overrun: every token costs a pass on both
paths, and the proof takes whole rows."""
_PLACES = {"memory": "in memory", "disk": "in a file that goes with the run"}


@contextmanager
def held(model: torch.nn.Module) -> Iterator[None]:
    """While open, which parameters train may change; afterwards it is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def outputs_of(model: torch.nn.Module) -> Iterator[list[Any]]:
    """While open, everything that `model` gives is also kept in the list."""
    given: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        yield given
    finally:
        handle.remove()


def _shortened(pair: dict[str, Any]) -> dict[str, Any]:
    """The end of a pair's prompt, and its completions to a little behind where they part."""
    chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
    end = common_prefix(chosen, rejected) + _TRIAL_TOKENS
    return {
        "prompt_ids": pair["prompt_ids"][-_TRIAL_TOKENS:],
        "chosen_ids": chosen[:end],
        "rejected_ids": rejected[:end],
    }


def _without_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != ROWS}


class _Later(dict[str, Any]):
    """A batch whose reference columns are made when TRL's loss reads them: after the policy's forward pass."""

    def __init__(self, inputs: dict[str, Any], make: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__(inputs)
        self._make = make

    def __missing__(self, name: str) -> torch.Tensor:
        if name not in COLUMNS:
            raise KeyError(name)
        self.update(made := self._make())
        return made[name]


class PreferenceTrainer(MicroBatches, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that come tokenised, with a learning rate of their own for opened weights."""

    opened_learning_rate: float
    mean_over_rows = True
    begins_as_reference = False
    """Whether policy and reference were seen to give the same bits before the first step."""
    _kept: KeptReference
    _shared: SharedPrompt

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        # `data.tokens` made the same columns from the proven rows, and counted what was cut or left out.
        return dataset

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimizer; opened weights get groups of their own."""
        optimizer = super().create_optimizer(model)
        return split_learning_rates(optimizer, self.model, self.opened_learning_rate)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, with what is kept of the reference in the place of TRL's precomputed columns.

        What trains is afterwards what trained before: PEFT opens a frozen adapter that it switches to.
        """
        with held(self.model):
            if not self.precompute_ref_logps or COLUMNS[0] in inputs:
                return super().compute_loss(model, inputs, *args, **kwargs)
            if not self._is_reference():
                logps = self._kept.logps(inputs, lambda: self.compute_ref_log_probs(model, _without_rows(inputs)))
                inputs = {**inputs, **dict(zip(COLUMNS, logps, strict=True))}
                return super().compute_loss(model, inputs, *args, **kwargs)
            with outputs_of(model) as outputs:
                batch = dict(inputs)

                def policys() -> tuple[torch.Tensor, torch.Tensor]:
                    chosen, rejected = outputs[-1].log_probs.detach().sum(dim=1).chunk(2)
                    return chosen, rejected

                later = _Later(inputs, lambda: dict(zip(COLUMNS, self._kept.logps(batch, policys), strict=True)))
                return super().compute_loss(model, later, *args, **kwargs)

    def _is_reference(self) -> bool:
        """Whether the policy is the reference still (no dropout or noise is let in), so that one pass scores both."""
        return self.begins_as_reference and self.state.global_step == 0 and self.ld_alpha is None

    def keep_reference(self, kept: KeptReference) -> None:
        """Takes the reference's log-probabilities from what is kept, instead of scoring it in every step."""
        self._kept = kept
        self.precompute_ref_logps = True

    def write_reference(self) -> None:
        """Brings what was scored of the reference to the disk."""
        self._kept.write()

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, and the same."""
        with held(self.model), log_probs_alone():
            return super().compute_ref_log_probs(model, inputs)

    def trial_batch(self) -> dict[str, Any]:
        """A few training pairs, as the collator makes a batch of them, to try a faster path on."""
        rows = self.train_dataset
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = [
            len(prompt) + max(len(chosen), len(rejected))
            for prompt, chosen, rejected in zip(*(rows[name] for name in names), strict=True)
        ]
        window = window_of(self.accelerator.unwrap_model(self.model).config)
        pairs = [rows[at] for at in trial_rows(lengths, _TRIAL_PAIRS, window)]
        batch: dict[str, Any] = self.data_collator(
            pairs if window is not None else [_shortened(pair) for pair in pairs]
        )
        return batch

    def share_prompts(self, batch: dict[str, Any], *, rounds: bool = False) -> str | None:
        """Encodes prompts once for both completions, if that computes the same as TRL's own forward.

        Args:
            batch: what the collator made, to compare the two on.
            rounds: whether float32 products are rounded to fewer bits.

        Returns:
            Why TRL's own forward is kept; None where prompts are shared.
        """
        self._shared = shared = SharedPrompt(self.model, rounds=rounds)
        refusal = shared.refusal()
        if refusal is None:
            shared.install()
            refusal = shared.check(self.model, self._prepare_inputs(dict(batch)))
            if refusal is not None:
                shared.uninstall()
        return refusal

    def keep_trunk(self, setting: str, batch: dict[str, Any], folder: Path) -> tuple[str | None, dict[str, Any] | None]:
        """Computes the blocks below everything that trains once for each row, if there are any.

        Args:
            setting: the experiment's `engine.trunk_cache`.
            batch: what the collator made, to compare on.
            folder: where a file may lie.

        Returns:
            What to tell the user, and what is kept where; None for each where there is nothing to say or to keep.
        """
        shared = self._shared
        blocks = frozen_blocks(shared.model) if shared.on and setting != "off" else []
        if not blocks:
            return None, None
        wanted = self._trunk_tokens()
        width = shared.model.config.get_text_config().hidden_size * shared.model.dtype.itemsize
        where: Where = "disk" if setting == "disk" else "memory"
        folder.mkdir(parents=True, exist_ok=True)
        tokens = min(wanted, room(where, folder) // width)
        if setting == "auto" and tokens < wanted:
            needed = f"{wanted * width / 2**30:.1f} GiB"
            return (
                f"frozen blocks are computed again each time: keeping their output takes {needed}, more than a quarter "
                "of the free memory (`engine.trunk_cache: disk` keeps it in a file)"
            ), None
        shared.trunk = Trunk(blocks, self._behind(blocks), tokens, where, folder)
        for _ in range(2):  # filled, and used
            refusal = shared.check(self.model, self._prepare_inputs(dict(batch)))
            if refusal is not None:
                shared.trunk = None
                return f"frozen blocks are computed again each time: {refusal}", None
        size = tokens * width
        beyond = "" if tokens == wanted else f" ({wanted - tokens:,} of {wanted:,} tokens do not fit)"
        line = f"{len(blocks)} frozen blocks are computed once a row: {size / 2**20:,.0f} MiB {_PLACES[where]}{beyond}"
        return line, {"blocks": len(blocks), "bytes": size, "where": where}

    def drop_trunk(self) -> None:
        """Gives back what is kept of frozen blocks."""
        self._shared.trunk = None

    def _behind(self, blocks: list[torch.nn.Module]) -> torch.nn.Module:
        names = anatomy_of(self._shared.model).blocks
        behind: torch.nn.Module = self._shared.model.get_submodule(names[len(blocks)])
        return behind

    def _trunk_tokens(self) -> int:
        """Tokens of all rows, each row once."""
        rows = {
            (tuple(row["prompt_ids"] + row["chosen_ids"]), tuple(row["prompt_ids"] + row["rejected_ids"]))
            for data in (self.train_dataset, self.eval_dataset)
            if data is not None
            for row in data
        }
        return sum(sum(joint_sizes(chosen, rejected)) for chosen, rejected in rows)
