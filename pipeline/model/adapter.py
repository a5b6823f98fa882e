"""Adapters on the disk and on a base: what a folder holds, attaching it for a while, saving a policy as one."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.data.bounds import BoundError, time_limit
from pipeline.errors import PipelineError, comes_from
from pipeline.machine import is_out_of_memory
from pipeline.model.fixed_lora import factors_of, fixed_loras
from pipeline.model.precision import dequantize, is_quantized
from pipeline.runs.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, staged_folder, write_json

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base."""
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of LoRA that take the adapter's part out of the base's own weights."""
FIXED_BIAS = "sft_bias"
"""The attribute of a policy that says which of the base's biases its SFT adapter holds: `all` or `lora_only`."""
KEPT = "sft_opened"
"""The attribute of a policy that lists the modules that SFT opened and DPO does not: frozen parts of its base."""
_MAX_CONFIG = 1024 * 1024
"""Bytes of an adapter's configuration; a usual one has one thousand."""
_PATTERN_SECONDS = 10.0
"""For all patterns of a configuration on all names of a model; usual ones take milliseconds."""
_KINDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_modules": (str, list, set),
    "modules_to_save": (list, set),
    "base_model_name_or_path": str,
    "bias": str,
}
"""What some keys of an adapter's configuration may be, of which PEFT checks nothing."""
_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}
"""Keys of an adapter's configuration that change nothing of what it computes, or how it is loaded."""


def adapter_sha256(folder: Path) -> str:
    """SHA-256 of the adapter's weights file."""
    with (folder / ADAPTER_WEIGHTS).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def adapter_config_sha256(folder: Path) -> str:
    """SHA-256 of what the adapter's configuration says of its function, such as `lora_alpha` and `target_modules`.

    In canonical JSON: keys and lists sorted, since PEFT writes its sets in any order; keys that only name where the
    adapter comes from are left out.

    Raises:
        PipelineError: the configuration cannot be read.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        matters = {
            key: sorted(value, key=str) if isinstance(value, list) else value
            for key, value in config.items()
            if key not in _NO_MATTER
        }
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(file, error) from error
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()


def hashes_of(folder: Path) -> dict[str, str]:
    """What `run.json` keeps of an adapter: `sha256` of its weights, `config_sha256` of what decides their use."""
    return {"sha256": adapter_sha256(folder), "config_sha256": adapter_config_sha256(folder)}


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
    changes = changes_of_base(base, read_config(folder), folder)
    values = [(parameter, parameter.data.clone()) for parameter in base.parameters()] if changes else []
    try:
        model = load_adapter(base, folder, is_trainable=False)
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
    """Writes the trained adapter as stock PEFT does, without the reference, the tokenizer beside it; whole or not.

    What the policy has beside PEFT's adapter is written into it, so that stock PEFT opens the whole of it on the base
    alone: a fixed LoRA by concatenation, biases that SFT trained as what `bias` stands for, modules that SFT opened
    among `modules_to_save`.
    """
    with staged_folder(folder) as staged:
        policy.save_pretrained(staged, selected_adapters=["default"], save_embedding_layers=False)
        fixed = fixed_loras(policy)
        bias, kept = getattr(policy, FIXED_BIAS, None), getattr(policy, KEPT, [])
        if fixed or kept or bias is not None:
            _complete(policy, staged, fixed, bias, kept)
        tokenizer.save_pretrained(staged)


def _complete(policy: Any, folder: Path, fixed: dict[str, Any], bias: str | None, kept: list[str]) -> None:
    """Rewrites what stock PEFT saved: LoRA and fixed LoRA of a layer become one of the sum of their ranks.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]. Their scalings are multiplied into B, and alpha equals r, so that PEFT scales
    by one.
    """
    from safetensors.torch import load_file, save_file

    weights_file, config_file = folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG
    state = load_file(weights_file)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if fixed:
        loras = {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}
        parts = {name: [factors_of(module)] for name, module in loras.items() if "default" in module.lora_A}
        for name, module in fixed.items():
            parts.setdefault(name.removesuffix(".base_layer"), []).append((module.down.data, module.up.data))
        ranks = {}
        for name, factors in parts.items():
            down, up = torch.cat([down for down, _ in factors]), torch.cat([up for _, up in factors], dim=1)
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down.cpu(), up.cpu().contiguous()
            ranks[name.removeprefix(PREFIX)] = len(down)
        rank = max(ranks.values())
        others = {name: own for name, own in ranks.items() if own != rank}
        config |= {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "use_rslora": False,
            "init_lora_weights": True,
            "target_modules": sorted(ranks),
            "layers_to_transform": None,
        }
    if bias is not None:
        config["bias"] = bias
        state |= {
            name: parameter.detach().cpu().clone()
            for name, parameter in policy.named_parameters()
            if name.endswith(".base_layer.bias" if bias == "lora_only" else "bias")
            and ".modules_to_save." not in name
            and ".original_module." not in name
        }
    for name in kept:
        module = policy.get_submodule(PREFIX + name)
        state |= {f"{PREFIX}{name}.{key}": weight.cpu().clone() for key, weight in module.state_dict().items()}
    if kept:
        config["modules_to_save"] = [*(config["modules_to_save"] or []), *kept]
    save_file(state, weights_file, metadata={"format": "pt"})
    write_json(config_file, config)


def read_config(folder: Path) -> Any:
    """PEFT's configuration of the adapter in `folder`.

    Raises:
        PipelineError: there is none, or it cannot be read.
    """
    from peft import PeftConfig

    file = require_adapter(folder) / ADAPTER_CONFIG
    try:
        size = file.stat().st_size
        config = PeftConfig.from_pretrained(folder) if size <= _MAX_CONFIG else None
    except Exception as error:
        raise _damaged(file, error) from error
    if config is None:
        raise _damaged(file, f"a configuration of {size:,} bytes, at most {_MAX_CONFIG:,} are read")
    for key, kind in _KINDS.items():
        value = getattr(config, key, None)
        if value is not None and not isinstance(value, kind):
            raise _damaged(file, f"`{key}` is a {type(value).__name__}")
    if not all(isinstance(name, str) for name in getattr(config, "modules_to_save", None) or ()):
        raise _damaged(file, "`modules_to_save` holds more than names")
    if getattr(config, "megatron_config", None):  # PEFT would import what it names
        raise PipelineError(
            "the adapter is for Megatron's layers, and asks for Python modules of its choice",
            code="unsupported-adapter",
            file=file,
            mend="start from a plain LoRA adapter",
        )
    return config


def changes_of_base(base: nn.Module, config: Any, folder: Path) -> list[str]:
    """What of an adapter PEFT writes into the base's own weights, where every adapter on it meets it.

    Raises:
        PipelineError: the weights cannot be read.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            keys = [key.removeprefix(PREFIX) for key in weights.keys()]  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / ADAPTER_WEIGHTS, error) from error
    carried = carried_modules(base, config)
    # Trained biases, and embeddings that were saved with the adapter.
    changes = [key for key in keys if "lora_" not in key and not within(key, carried)]
    initialisation = str(getattr(config, "init_lora_weights", ""))
    if initialisation.lower().startswith(REWRITING):
        changes.append(f"what `init_lora_weights: {initialisation}` changes")
    return changes


def load_adapter(base: Any, folder: Path, *, is_trainable: bool) -> Any:
    """The adapter in `folder` on `base`, as stock PEFT opens it.

    Raises:
        PipelineError: it does not fit the base.
    """
    from peft import PeftModel

    config = read_config(folder)
    _require_bounded(base, config, folder)
    if is_quantized(base):  # PEFT would load the whole weights of an opened block into packed ones
        dequantize(base, carried_modules(base, config))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
        # Loaded once more, for PEFT to say what did not match: an adapter of a deeper or shallower base.
        result = model.load_adapter(folder, "default", is_trainable=is_trainable)
    except Exception as error:  # a configuration of strangers: any value may stand at any key, and PEFT checks few
        if is_out_of_memory(error) or not comes_from(error, "peft"):
            raise
        raise _misfit(folder, " ".join(str(error).split())[:300]) from error
    if result.unexpected_keys:
        raise _misfit(folder, f"it holds weights for {some(result.unexpected_keys)}, which the base has not")
    if result.missing_keys:
        raise _misfit(folder, f"it holds no weights for {some(result.missing_keys)}")
    return model


def _require_bounded(base: nn.Module, config: Any, folder: Path) -> None:
    """Ranks are those of the weights, and patterns come to an end: PEFT would take whatever memory and time they ask.

    Raises:
        PipelineError: one of them does not, or the weights cannot be read.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            keys = [key for key in weights.keys() if "lora_A" in key]  # noqa: SIM118 - it is no mapping
            largest = max((weights.get_slice(key).get_shape()[0] for key in keys), default=None)
    except (SafetensorError, OSError, IndexError) as error:
        raise _damaged(folder / ADAPTER_WEIGHTS, error) from error
    ranks = getattr(config, "rank_pattern", None) or {}
    rank = max([one for one in (getattr(config, "r", 0), *ranks.values()) if isinstance(one, int)], default=0)
    if largest is not None and rank > largest:
        raise _misfit(folder, f"it asks for rank {rank}, and its weights have rank {largest}")
    patterns = [getattr(config, key, None) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        patterns += getattr(config, key, None) or ()
    try:
        with time_limit(_PATTERN_SECONDS):
            for pattern in patterns:
                if isinstance(pattern, str):
                    for name, _ in base.named_modules():
                        re.fullmatch(rf"(.*\.)?({pattern})(\..*)?", name)
    except (re.error, BoundError, RecursionError) as error:
        raise _misfit(folder, f"a pattern of its configuration cannot be used: {error}") from error


def _misfit(folder: Path, cause: str) -> PipelineError:
    return PipelineError(
        f"the adapter in {folder} does not fit the base: {cause}",
        code="adapter-mismatch",
        mend="use the base that the adapter was trained on (its adapter_config.json names it)",
    )


def _damaged(file: Path, error: Exception | str) -> PipelineError:
    return PipelineError(
        f"the adapter cannot be read: {' '.join(str(error).split())[:300]}",
        code="damaged-adapter",
        file=file,
        mend="copy the adapter again, or train it again",
    )


def carried_modules(base: nn.Module, config: Any) -> list[str]:
    """Full names of the modules that PEFT wraps for `modules_to_save`: all whose names end so, at a dot or not."""
    suffixes = tuple(getattr(config, "modules_to_save", None) or ())
    return [name for name, _ in base.named_modules() if name.endswith(suffixes)]


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of `modules` or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def some(names: list[str]) -> str:
    """The first few of the names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
