"""TRL's SFTTrainer on rows that come tokenised and labelled."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from pipeline.training.engine.micro_batches import MicroBatches
from pipeline.training.engine.rates import split_learning_rates


class DemonstrationTrainer(MicroBatches, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with a learning rate of their own for opened weights."""

    opened_learning_rate: float

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimizer; opened weights get groups of their own."""
        optimizer = super().create_optimizer(model)
        return split_learning_rates(optimizer, self.model, self.opened_learning_rate)
