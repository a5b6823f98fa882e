"""TRL's DPOTrainer on pairs that come tokenised."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from pipeline.training.engine.micro_batches import MicroBatches
from pipeline.training.stage import split_learning_rates


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
