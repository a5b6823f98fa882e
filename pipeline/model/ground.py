"""What a stage or a comparison stands on before any weight is loaded: base, device, tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.experiment import Experiment
from pipeline.model.base import BaseFiles, find_base, load_tokenizer, require_bitsandbytes
from pipeline.model.device import Placement, place, reuse_memory

Say = Callable[[str], None]
"""Tells the user one line."""


@dataclass(frozen=True)
class Ground:
    """What a stage stands on before any weight is loaded."""

    files: BaseFiles
    base_sha256: str
    placement: Placement
    tokenizer: Any


def prepare_ground(experiment: Experiment, say: Say) -> Ground:
    """Finds the base, picks the device, loads the tokenizer; says which.

    Raises:
        PipelineError: one of them is not to be had.
    """
    placement = place(experiment.model.device, experiment.model.dtype)
    reuse_memory()
    if experiment.model.quantize == "nf4":
        require_bitsandbytes("`model.quantize: nf4`", "/model/quantize")
    say(f"device: {placement.describe()}")
    files = find_base(experiment.model, say)
    at = f" at {files.revision[:12]}" if files.revision else ""
    say(f"base: {files.id}{at}")
    tokenizer = load_tokenizer(files, experiment.model, experiment.tokenizer.chat_template)
    return Ground(files, files.sha256(), placement, tokenizer)


def quiet_libraries() -> None:
    """Takes away the libraries' own progress bars, and what they tell each other's authors.

    Their deprecation notices are about calls that TRL or we make, which nobody who trains can change.
    """
    import datasets
    import transformers

    for library in ("transformers", "trl", "peft", "accelerate", "datasets"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}(\.|$)")
    # PEFT on an opened head that was tied to the embeddings: it is untied on purpose, and `say_trainable` says so.
    warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
