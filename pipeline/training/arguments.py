"""From a stage of the experiment to TRL's configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment import Dpo, Sft
from pipeline.model.base import require_bitsandbytes
from pipeline.model.device import Placement
from pipeline.runs.checkpoints import KEEP_AT_LEAST
from pipeline.runs.run import Stage
from pipeline.trl_options import check_options

_OWN = {"adapter", "unfreeze", "options"}
"""Keys of a stage that are ours; every other one is TRL's, by name and meaning."""
_BITSANDBYTES = re.compile(r"paged|bnb|^(adamw|ademamix|lion)_8bit$")
"""The optimizers of Transformers' `optim` that are bitsandbytes'."""


def sft_config(stage: Sft, *, output: Path, seed: int, placement: Placement, evaluates: bool) -> Any:
    """TRL's SFTConfig: tokenised rows come with their labels, so none of its masking options is used."""
    from trl import SFTConfig

    return SFTConfig(**_common(stage, output, seed, placement, evaluates))


def dpo_config(stage: Dpo, *, output: Path, seed: int, placement: Placement, evaluates: bool) -> Any:
    """TRL's DPOConfig."""
    from trl import DPOConfig

    return DPOConfig(**_common(stage, output, seed, placement, evaluates))


def _common(stage: Sft | Dpo, output: Path, seed: int, placement: Placement, evaluates: bool) -> dict[str, Any]:
    import torch

    given = {key: value for key, value in stage.model_dump().items() if key not in _OWN and value is not None}
    if not evaluates:
        given["eval_strategy"] = "no"
    return {
        **given,
        "output_dir": str(output),
        "seed": seed,
        "use_cpu": placement.device.type == "cpu",
        # Half-precision base weights train under autocast: LoRA and opened weights stay in float32.
        "bf16": placement.dtype == torch.bfloat16,
        "fp16": placement.dtype == torch.float16,
        "save_total_limit": max(stage.save_total_limit, KEEP_AT_LEAST) if stage.save_total_limit else None,
        "eval_on_start": given["eval_strategy"] != "no",
        "logging_strategy": "steps",
        "logging_first_step": True,
        # Trainer would log the last finite loss in place of NaN.
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": placement.device.type == "cuda",
        **stage.options,
    }


def require_options(stage: Stage, options: dict[str, Any]) -> None:
    """Checks a stage's `options` against the fields of TRL's configuration.

    Raises:
        PipelineErrors: every one that is unknown, of another type, or would break a promise.
    """
    problems = check_options(stage, options)
    if problems:
        raise PipelineErrors(problems)


def require_optimizer(stage: Stage, options: dict[str, Any], placement: Placement) -> None:
    """Checks that the optimizer that `options` name is to be had here.

    Raises:
        PipelineError: it is one of bitsandbytes, which is not installed, or needs a GPU that is not there.
    """
    optim, pointer = str(options.get("optim", "")), f"/{stage}/options/optim"
    if not _BITSANDBYTES.search(optim):
        return
    require_bitsandbytes(f"`optim: {optim}`", pointer)
    if "paged" in optim and placement.device.type != "cuda":
        raise PipelineError(
            f"`optim: {optim}` pages its state between GPU and CPU memory, and this runs on {placement.describe()}",
            code="conflict",
            pointer=pointer,
            mend="use `adamw_8bit`, or remove the line",
        )
