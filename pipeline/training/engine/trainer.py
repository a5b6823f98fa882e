"""TRL's DPOTrainer on pairs that come tokenised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl import DPOTrainer

from pipeline.training.engine.micro_batches import MicroBatches
from pipeline.training.engine.shared_prompt import SharedPrompt
from pipeline.training.stage import split_learning_rates


@contextmanager
def held(model: torch.nn.Module) -> Iterator[None]:
    """While open, which parameters train may change; afterwards it is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


class PreferenceTrainer(MicroBatches, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that come tokenised, with a learning rate of their own for opened weights."""

    opened_learning_rate: float
    mean_over_rows = True

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        # `data.tokens` made the same columns from the proven rows, and counted what was cut or left out.
        return dataset

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimizer; opened weights get groups of their own."""
        optimizer = super().create_optimizer(model)
        return split_learning_rates(optimizer, self.model, self.opened_learning_rate)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's; what trains is afterwards what trained before: PEFT opens a frozen adapter that it switches to."""
        with held(self.model):
            return super().compute_ref_log_probs(model, inputs)

    def share_prompts(self, batch: dict[str, Any]) -> str | None:
        """Encodes prompts once for both completions, if that computes the same as TRL's own forward.

        Args:
            batch: what the collator made, to compare the two on.

        Returns:
            Why TRL's own forward is kept; None where prompts are shared.
        """
        shared = SharedPrompt(self.model)
        refusal = shared.refusal()
        if refusal is None:
            shared.install()
            refusal = shared.check(self.model, self._prepare_inputs(dict(batch)))
            if refusal is not None:
                shared.uninstall()
        return refusal
