"""Adapters on a base: opening the SFT adapter for DPO, attaching finished ones for a while, saving.

The usual partial unfreezing shares the opened blocks between policy and reference, and the reference moves with the
policy. Here opened modules go through PEFT's `modules_to_save`: each adapter, TRL's reference among them, gets its
own copy. LoRA and an opened block do not overlap, so the SFT adapter's LoRA on those blocks is first folded into
the block's weights (W + alpha/r * B A, Hu et al. 2021, section 4.1), which both copies then start from.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.errors import PipelineError
from pipeline.experiment import Unfreeze
from pipeline.model.anatomy import anatomy_of
from pipeline.model.scope import hold_in_float32, opened_modules
from pipeline.runs.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, staged_folder

_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base."""
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of LoRA that take the adapter's part out of the base's own weights."""


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
        folder: the SFT adapter: one of ours or a LoRA adapter that PEFT saved.
        unfreeze: what DPO opens.

    Raises:
        PipelineError: the folder holds no LoRA adapter, or one that changes the base itself or reaches beyond its
            blocks; it does not fit the base; or it carries opened modules that DPO would not open.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = _config_of(folder)
    if type(config) is not LoraConfig or config.task_type not in (None, "CAUSAL_LM"):
        what = type(config).__name__ + (f" for {config.task_type}" if config.task_type else "")
        raise _unsupported(f"{folder} holds a {what}, and DPO is stacked on a LoraConfig for CAUSAL_LM")
    changes = _changes_of_base(base, config, folder)
    if changes:
        raise _unsupported(
            f"the SFT adapter changes weights of the base, which policy and reference share: {_some(changes)}"
        )
    anatomy = anatomy_of(base)
    opened = opened_modules(anatomy, unfreeze)
    carried = _carried(base, config)
    left_shut = [name for name in carried if not _within(name, opened)]
    if left_shut:
        raise PipelineError(
            f"the SFT adapter carries trained {_some(left_shut)}, which DPO would not open",
            code="conflict",
            file=folder,
            pointer="/dpo/unfreeze",
            mend="open in `dpo.unfreeze` at least what SFT opened",
        )
    hold_in_float32(base, opened)
    policy = _load(base, folder, is_trainable=True)
    with_lora = [name.removeprefix(_PREFIX) for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    outside = [name for name in with_lora if not _within(name, anatomy.blocks)]
    if outside:
        raise _unsupported(f"the SFT adapter has LoRA outside the model's blocks: {_some(outside)}")
    if set(opened) == set(carried):
        return policy

    kept = [
        index
        for index, block in enumerate(anatomy.blocks)
        if block not in opened and any(_within(name, [block]) for name in with_lora)
    ]
    if not kept:
        raise PipelineError(
            "DPO opens every block that carries the SFT adapter's LoRA, so no adapter would be left",
            code="conflict",
            pointer="/dpo/unfreeze/last_blocks",
            mend="open fewer blocks",
        )
    weights = {
        name: weight.clone()
        for name, weight in get_peft_model_state_dict(policy, save_embedding_layers=False).items()
        if not _within(name.removeprefix(_PREFIX), opened)
    }
    for name in opened:
        for module in policy.get_submodule(_PREFIX + name).modules():
            if hasattr(module, "lora_A"):
                module.merge(safe_merge=True, adapter_names=["default"])
    folded = policy.unload()
    if not isinstance(config.target_modules, str):  # PEFT takes no layers beside a pattern; opened modules are left out
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

    PEFT's own `unload` leaves in the base the trained copies of `modules_to_save`, trained biases, and weights that
    an initialisation took the adapter's part out of.

    Raises:
        PipelineError: the folder holds no adapter, or it does not fit the base.
    """
    structure = [(module, module.training, dict(module._modules)) for module in base.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    known = set(vars(base))
    changes = _changes_of_base(base, _config_of(folder), folder)
    values = [(parameter, parameter.data.clone()) for parameter in base.parameters()] if changes else []
    try:
        model = _load(base, folder, is_trainable=False)
        model.eval()
        yield model
    finally:
        for module, training, children in structure:
            module.training = training
            module._modules.clear()
            module._modules.update(children)
        for parameter, value in values:
            parameter.data = value
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for added in set(vars(base)) - known:
            delattr(base, added)


def save_adapter(policy: Any, tokenizer: Any, folder: Path) -> None:
    """Writes the trained adapter as stock PEFT does, without the reference, the tokenizer beside it; whole or not."""
    with staged_folder(folder) as staged:
        policy.save_pretrained(staged, selected_adapters=["default"], save_embedding_layers=False)
        tokenizer.save_pretrained(staged)


def _config_of(folder: Path) -> Any:
    from peft import PeftConfig

    require_adapter(folder)
    try:
        return PeftConfig.from_pretrained(folder)
    except Exception as error:
        raise _damaged(folder / ADAPTER_CONFIG, error) from error


def _changes_of_base(base: nn.Module, config: Any, folder: Path) -> list[str]:
    """What of an adapter PEFT writes into the base's own weights, where every adapter on it meets it."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            keys = [key.removeprefix(_PREFIX) for key in weights.keys()]  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise _damaged(folder / ADAPTER_WEIGHTS, error) from error
    carried = _carried(base, config)
    # Trained biases, and embeddings that were saved with the adapter.
    changes = [key for key in keys if "lora_" not in key and not _within(key, carried)]
    initialisation = str(getattr(config, "init_lora_weights", ""))
    if initialisation.lower().startswith(_REWRITING):
        changes.append(f"what `init_lora_weights: {initialisation}` changes")
    return changes


def _load(base: Any, folder: Path, *, is_trainable: bool) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
        # Loaded once more, for PEFT to say what did not match: an adapter of a deeper or shallower base.
        result = model.load_adapter(folder, "default", is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(folder, " ".join(str(error).split())[:300]) from error
    if result.unexpected_keys:
        raise _misfit(folder, f"it holds weights for {_some(result.unexpected_keys)}, which the base has not")
    if result.missing_keys:
        raise _misfit(folder, f"it holds no weights for {_some(result.missing_keys)}")
    return model


def _misfit(folder: Path, cause: str) -> PipelineError:
    return PipelineError(
        f"the adapter in {folder} does not fit the base: {cause}",
        code="adapter-mismatch",
        mend="use the base that the adapter was trained on (its adapter_config.json names it)",
    )


def _damaged(file: Path, error: Exception) -> PipelineError:
    return PipelineError(
        f"the adapter cannot be read: {' '.join(str(error).split())[:300]}",
        code="damaged-adapter",
        file=file,
        mend="copy the adapter again, or train it again",
    )


def _unsupported(cause: str) -> PipelineError:
    return PipelineError(
        cause, code="unsupported-adapter", mend="start from a plain LoRA adapter on the model's blocks (`bias: none`)"
    )


def _carried(base: nn.Module, config: Any) -> list[str]:
    """Full names of the modules that PEFT wraps for `modules_to_save`: all whose names end so, at a dot or not."""
    suffixes = tuple(getattr(config, "modules_to_save", None) or ())
    return [name for name, _ in base.named_modules() if name.endswith(suffixes)]


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of `modules` or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
