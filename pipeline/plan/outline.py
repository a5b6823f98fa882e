"""The policy of a stage as shapes without weights: built on the meta device by the functions that training uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.experiment import Experiment, Model
from pipeline.model.adapter import within
from pipeline.model.anatomy import anatomy_of
from pipeline.model.base import _HUB_FILES, BaseFiles, _unloadable, find_base, reading, require_whole
from pipeline.model.builtin import PREFIX
from pipeline.model.policy import new_policy, stack
from pipeline.model.precision import hold_in_float32
from pipeline.model.scope import REFERENCE, lora_config, opened_modules
from pipeline.runs.run import Stage

_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Files by which a folder shows that it holds a tokenizer. Transformers makes an empty one without any."""


def find_config(model: Model, *, tokenizer: bool, say: Callable[[str], None] | None = None) -> BaseFiles:
    """The folder that holds the base's configuration; of a hub model no weights are fetched for it.

    Args:
        model: the experiment's model section.
        tokenizer: fetches the tokenizer's files of a hub model as well.
        say: told of a conversion.

    Raises:
        PipelineError: as `find_base`, but a model without weights will do.
    """
    folder = Path(model.id).expanduser()
    if (folder / "config.json").is_file():
        return require_whole(BaseFiles(model.id, folder, None, None))
    if folder.exists() or model.id.startswith((PREFIX, ".", "~", "/")) or model.id.endswith(".gguf"):
        return find_base(model, say)
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in _HUB_FILES if "safetensors" not in pattern] if tokenizer else ["config.json"]
    try:
        folder = Path(snapshot_download(model.id, revision=model.revision, allow_patterns=wanted))
    except Exception:
        # Asked again for all of it, the hub refuses for the same reason, which is then told in training's words.
        return find_base(model)
    return require_whole(BaseFiles(model.id, folder, None, folder.name))


def holds_tokenizer(files: BaseFiles) -> bool:
    """Whether the base's tokenizer is at hand; a GGUF file carries its own."""
    return files.gguf is not None or any(file for pattern in _TOKENIZER for file in files.folder.glob(pattern))


@dataclass(frozen=True)
class Outline:
    """A policy on the meta device: every tensor has its shape and dtype, none has values."""

    policy: Any
    """The PEFT model that the stage trains; for DPO with TRL's frozen copy `ref`."""
    quantized: frozenset[int]
    """`id` of each weight that is held in 4 bits."""


def outline(files: BaseFiles, experiment: Experiment, stage: Stage, dtype: torch.dtype) -> Outline:
    """The policy that `stage` trains, module for module and dtype for dtype.

    Args:
        files: where the base's configuration is.
        experiment: the definition.
        stage: `dpo` adds the reference.
        dtype: of the base weights.

    Raises:
        PipelineError: the configuration is no causal language model's, or the scope does not fit the model.
    """
    with torch.device("meta"):
        base = _base(files, experiment.model, dtype)
        four_bits = _linear_weights(base) if experiment.model.quantize == "nf4" else {}
        policy, opened = _policy(base, experiment, stage, files.revision)
        if stage == "dpo":
            policy.add_adapter(REFERENCE, policy.peft_config["default"])
    packed = [weight for name, weight in four_bits.items() if not within(name, opened)]
    return Outline(policy.train(), frozenset(id(weight) for weight in packed))


def _policy(base: Any, experiment: Experiment, stage: Stage, revision: str | None) -> tuple[Any, list[str]]:
    """The PEFT model that `stage` trains, and the modules whose weights are held whole: what it or SFT opens."""
    lora, adapter = experiment.scope.lora, experiment.dpo.adapter
    unfreeze, pointer = experiment.unfreeze_of(stage)
    before, where = experiment.unfreeze_of("sft")
    anatomy = anatomy_of(base)
    opened, kept = opened_modules(anatomy, unfreeze, pointer), []
    if stage == "dpo" and experiment.data.demonstrations is not None:
        kept = [name for name in opened_modules(anatomy, before, where) if name not in opened]
    if stage == "dpo" and (kept or adapter != "continue"):
        hold_in_float32(base, [*opened, *kept])
        sft = new_policy(base, lora_config(base, lora, before, revision, pointer=where))
        return stack(sft, opened, kept, unfreeze, adapter=adapter, lora=lora, pointer=pointer), [*opened, *kept]
    config = lora_config(base, lora, unfreeze, revision, pointer=pointer)
    if stage == "dpo":
        config.bias = "none"  # the biases that SFT trained hold still
    return new_policy(base, config), opened


def _base(files: BaseFiles, model: Model, dtype: torch.dtype) -> Any:
    """The base as `load_base` gives it, on the default device.

    Raises:
        PipelineError: the configuration is damaged, is no causal language model's, or needs code that was not
            allowed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    given: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    where = {"gguf_file": files.gguf} if files.gguf else {}
    how = {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    try:
        with reading(files):
            config = AutoConfig.from_pretrained(files.folder, local_files_only=True, **where, **given)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **how, **given)
    except Exception as error:
        raise _unloadable(files, error) from error


def _linear_weights(base: Any) -> dict[str, torch.Tensor]:
    """What bitsandbytes holds in 4 bits: the weight of every linear layer but the head's, by module name."""
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    return {
        name: module.weight
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
