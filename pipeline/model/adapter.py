"""Adapters on a base: opening the SFT adapter for DPO, attaching finished ones for a while, saving.

The usual partial unfreezing shares the opened blocks between policy and reference, and the reference moves with the
policy. Here opened modules go through PEFT's `modules_to_save`: each adapter, TRL's reference among them, gets its
own copy. LoRA and an opened block do not overlap, so the SFT adapter's LoRA on those blocks is first folded into
the block's weights (W + alpha/r * B A, Hu et al. 2021, section 4.1), which both copies then start from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import PipelineError
from pipeline.experiment import Unfreeze
from pipeline.model.anatomy import anatomy_of
from pipeline.model.scope import hold_in_float32, opened_modules
from pipeline.runs.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def adapter_sha256(folder: Path) -> str:
    """SHA-256 of the adapter's weights file."""
    with (folder / ADAPTER_WEIGHTS).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_adapter(folder: Path) -> Path:
    """`folder`, if a PEFT adapter in safetensors lies there.

    Raises:
        PipelineError: it does not.
    """
    for needed in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / needed).is_file():
            raise PipelineError(
                f"{folder} is no PEFT adapter: it holds no {needed}",
                code="no-adapter",
                mend="name a run folder, or a folder that PEFT's `save_pretrained` wrote (safetensors only)",
            )
    return folder


def open_policy(base: Any, folder: Path, unfreeze: Unfreeze) -> Any:
    """The SFT adapter on `base` as trainable policy (PEFT's adapter `default`), with more weights opened if asked.

    What the policy computes is what the SFT model computes, up to the rounding of the fold.

    Args:
        base: the Transformers model; it is changed in place.
        folder: the SFT adapter: one of ours or any LoRA adapter that PEFT saved.
        unfreeze: what DPO opens.

    Raises:
        PipelineError: the folder holds no LoRA adapter, it does not fit the base, or it carries opened modules
            that DPO would not open.
    """
    from peft import (
        LoraConfig,
        PeftConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    config = PeftConfig.from_pretrained(require_adapter(folder))
    if not isinstance(config, LoraConfig):
        raise PipelineError(
            f"{folder} holds a {config.peft_type} adapter, and DPO is stacked on LoRA",
            code="unsupported-adapter",
            mend="name a LoRA adapter",
        )
    anatomy = anatomy_of(base)
    opened = opened_modules(anatomy, unfreeze)
    carried = _full_names(base, config.modules_to_save or [])
    left_shut = [name for name in carried if name not in opened]
    if left_shut:
        raise PipelineError(
            f"the SFT adapter carries trained {', '.join(left_shut)}, which DPO would not open",
            code="conflict",
            file=folder,
            pointer="/dpo/unfreeze",
            mend="open in `dpo.unfreeze` at least what SFT opened",
        )
    hold_in_float32(base, opened)
    policy = _load(base, folder, is_trainable=True)
    if set(opened) == set(carried):
        return policy

    blocks = {name: index for index, name in enumerate(anatomy.blocks)}
    prefix = "base_model.model."
    with_lora = {
        index
        for name, index in blocks.items()
        if any(hasattr(module, "lora_A") for module in policy.get_submodule(prefix + name).modules())
    }
    kept = sorted(index for index in with_lora if anatomy.blocks[index] not in opened)
    if not kept:
        raise PipelineError(
            "DPO opens every block that carries the SFT adapter's LoRA, so no adapter would be left",
            code="conflict",
            pointer="/dpo/unfreeze/last_blocks",
            mend="open fewer blocks",
        )
    shut_prefixes = tuple(f"{prefix}{name}." for name in opened)
    weights = {
        name: weight.clone()
        for name, weight in get_peft_model_state_dict(policy, save_embedding_layers=False).items()
        if not name.startswith(shut_prefixes) and name.removesuffix(".weight") not in [prefix + o for o in opened]
    }
    for name in opened:
        for module in policy.get_submodule(prefix + name).modules():
            if hasattr(module, "lora_A"):
                module.merge(safe_merge=True, adapter_names=["default"])
    folded = policy.unload()
    vars(folded).pop("peft_config", None)
    config.layers_to_transform = kept
    config.modules_to_save = opened
    config.inference_mode = False
    stacked = get_peft_model(folded, config)
    state = get_peft_model_state_dict(stacked, save_embedding_layers=False)
    assert set(weights) <= set(state), "LoRA below the opened blocks is the SFT adapter's, key for key"
    set_peft_model_state_dict(stacked, state | weights)
    return stacked


@contextmanager
def attached(base: nn.Module, folder: Path) -> Iterator[Any]:
    """The adapter in `folder` on `base`, for reading; `base` is afterwards as it was, module for module.

    PEFT's own `unload` leaves trained copies of `modules_to_save` in the base.

    Raises:
        PipelineError: the folder holds no adapter, or it does not fit the base.
    """
    structure = [(module, dict(module._modules)) for module in base.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    known = set(vars(base))
    try:
        model = _load(base, require_adapter(folder), is_trainable=False)
        model.eval()
        yield model
    finally:
        for module, children in structure:
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for added in set(vars(base)) - known:
            delattr(base, added)


def save_adapter(policy: Any, tokenizer: Any, folder: Path) -> None:
    """Writes the trained adapter as stock PEFT does, without the reference, the tokenizer beside it."""
    policy.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def _load(base: Any, folder: Path, *, is_trainable: bool) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise PipelineError(
            f"the adapter in {folder} does not fit the base: {' '.join(str(error).split())[:300]}",
            code="adapter-mismatch",
            mend="use the base that the adapter was trained on (its adapter_config.json names it)",
        ) from error


def _full_names(base: nn.Module, suffixes: list[str]) -> list[str]:
    return [
        name
        for name, _ in base.named_modules()
        if any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
    ]
