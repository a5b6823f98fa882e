"""The policy of a stage: a new adapter on the base for SFT, the SFT adapter opened for DPO.

The usual partial unfreezing shares the opened blocks between policy and reference, and the reference moves with the
policy. Here opened modules go through PEFT's `modules_to_save`: each adapter, TRL's reference among them, gets its
own copy. LoRA and an opened block do not overlap, so the SFT adapter's LoRA on those blocks is first folded into
the block's weights (W + alpha/r * B A, Hu et al. 2021, section 4.1), which both copies then start from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import PipelineError, comes_from
from pipeline.experiment import DpoAdapter, Lora, Unfreeze
from pipeline.model.adapter import (
    FIXED_BIAS,
    KEPT,
    PREFIX,
    REWRITING,
    carried_modules,
    changes_of_base,
    load_adapter,
    read_config,
    some,
    within,
)
from pipeline.model.anatomy import anatomy_of, linear_layers
from pipeline.model.fixed_lora import factors_of, fix
from pipeline.model.precision import hold_in_float32
from pipeline.model.scope import lora_config, opened_modules
from pipeline.runs.files import ADAPTER_CONFIG


def new_policy(base: Any, config: Any) -> Any:
    """A fresh adapter on `base`, which is left with its own weights whatever the initialisation.

    PiSSA and OLoRA start the adapter at a part of the weight and take that part out of the base (Meng et al. 2024,
    equation 5). Then the adapter means nothing without that changed base. Here the base keeps its weight, and the part
    is taken out by a fixed LoRA beside it, which `save_adapter` writes into the adapter.

    Args:
        base: the Transformers model; it is changed in place.
        config: PEFT's, as `lora_config` makes it.

    Raises:
        PipelineError: PEFT refuses the adapter for this model.
    """
    from peft import get_peft_model

    hold_in_float32(base, config.modules_to_save or [])
    rewrites = str(config.init_lora_weights).lower().startswith(REWRITING)
    weights = _linear_weights(base) if rewrites else {}
    try:
        policy = get_peft_model(base, config)
    except (TypeError, ValueError) as error:  # layers that LoRA cannot go on, or a rank too high for the initialisation
        if not comes_from(error, "peft"):
            raise
        raise PipelineError(
            f"PEFT refuses this adapter on {type(base).__name__}: {' '.join(str(error).split())[:300]}",
            code="unsupported-scope",
            pointer="/scope/lora",
            mend="list other `target_modules`, or change what the message names",
        ) from error
    if not rewrites:
        return policy
    policy.peft_config["default"].init_lora_weights = True  # a second adapter, the reference, leaves the base alone
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):
            layer = module.get_base_layer()
            layer.weight.data = weights[name.removeprefix(PREFIX)]
            down, up = factors_of(module)
            fix(layer, down, -up)
    return policy


def _linear_weights(base: Any) -> dict[str, Any]:
    names = [f"{block}.{name}" for block in anatomy_of(base).blocks for name in linear_layers(base, block)]
    return {name: base.get_submodule(name).weight.data.clone() for name in names}


def open_policy(
    base: Any,
    folder: Path,
    unfreeze: Unfreeze,
    *,
    adapter: DpoAdapter = "continue",
    lora: Lora | None = None,
    pointer: str = "/dpo/unfreeze",
) -> Any:
    """The SFT adapter on `base` as trainable policy (PEFT's adapter `default`), with more weights opened if asked.

    What the policy computes is what the SFT model computes, up to the rounding of the fold. Modules that SFT opened and
    DPO does not become a frozen part of the base, which policy and reference share, and `save_adapter` writes them
    along.

    Args:
        base: the Transformers model; it is changed in place.
        folder: the SFT adapter: one of ours or a LoRA adapter that PEFT saved.
        unfreeze: what DPO opens.
        adapter: `continue` trains the SFT adapter on; `new` trains a fresh one on top of it; `frozen` trains what is
            opened, and no adapter.
        lora: the fresh adapter of `new`.
        pointer: where `unfreeze` stands in the experiment.

    Raises:
        PipelineError: the folder holds no LoRA adapter, or one that changes the base itself or reaches beyond its
            blocks; it does not fit the base; or it carries parts of blocks that DPO would not open.
    """
    config = read_config(folder)
    require_stackable(config, folder, adapter)
    _require_plain(base, config, folder)
    anatomy = anatomy_of(base)
    opened = opened_modules(anatomy, unfreeze, pointer)
    kept = [name for name in carried_modules(base, config) if not within(name, opened)]
    parts = [name for name in kept if name not in (*anatomy.blocks, anatomy.final_norm, anatomy.head)]
    if parts:
        raise PipelineError(
            f"the SFT adapter carries trained {some(parts)}, and only whole blocks, the final norm and the head can "
            "stay as SFT left them",
            code="conflict",
            file=folder,
            pointer=pointer,
            mend="open in `dpo.unfreeze` at least the blocks that hold what SFT opened",
        )
    hold_in_float32(base, [*opened, *kept])
    policy = load_adapter(base, folder, is_trainable=True)
    with_lora = [name.removeprefix(PREFIX) for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    outside = [name for name in with_lora if not within(name, anatomy.blocks)]
    if outside:
        raise unsupported(f"the SFT adapter has LoRA outside the model's blocks: {some(outside)}")
    policy = stack(policy, opened, kept, unfreeze, adapter=adapter, lora=lora, pointer=pointer)
    if config.bias != "none":
        setattr(policy, FIXED_BIAS, config.bias)
        for name, parameter in policy.named_parameters():
            if "lora_" not in name and ".modules_to_save." not in name:
                parameter.requires_grad_(False)
    return policy


def stack(
    policy: Any,
    opened: list[str],
    kept: list[str],
    unfreeze: Unfreeze,
    *,
    adapter: DpoAdapter,
    lora: Lora | None,
    pointer: str,
) -> Any:
    """What DPO trains, from the SFT adapter as PEFT opened it.

    Args:
        policy: a PEFT model; it is taken apart.
        opened: the modules that `unfreeze` opens.
        kept: the modules that SFT opened and DPO does not.
        unfreeze: as in `open_policy`.
        adapter: the same.
        lora: the same.
        pointer: the same.

    Raises:
        PipelineError: nothing of the adapter would be left, or it cannot be a fixed part.
    """
    config = policy.peft_config["default"]
    config.bias = "none"  # PEFT takes no second adapter, the reference, beside one that trains biases
    with_lora = [name.removeprefix(PREFIX) for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    if adapter == "continue":
        if set(opened) == set(config.modules_to_save or ()):
            return policy
        stacked = _with_opened(policy, config, opened, kept, with_lora, pointer)
    else:
        base = _with_fixed(policy, opened, with_lora)
        fresh = lora if adapter == "new" else None
        stacked = new_policy(base, lora_config(base, fresh, unfreeze, config.revision, pointer=pointer, kept=kept))
    setattr(stacked, KEPT, kept)
    return stacked


def require_stackable(config: Any, folder: Path, adapter: DpoAdapter) -> None:
    """What an adapter's configuration alone tells, before a model is loaded.

    Args:
        config: PEFT's, of the SFT adapter.
        folder: where it lies.
        adapter: `dpo.adapter`.

    Raises:
        PipelineError: it is no LoRA for causal language models; or it is no sum, so that it cannot be a fixed part
            that another adapter is added to.
    """
    from peft import LoraConfig

    if type(config) is not LoraConfig or config.task_type not in (None, "CAUSAL_LM"):
        what = type(config).__name__ + (f" for {config.task_type}" if config.task_type else "")
        raise unsupported(f"{folder} holds a {what}, and DPO is stacked on a LoraConfig for CAUSAL_LM")
    if adapter != "continue" and (config.use_dora or config.lora_bias):
        what = "`use_dora`, which scales the whole weight" if config.use_dora else "`lora_bias`"
        raise unsupported(
            f"the SFT adapter has {what}: it cannot be a fixed part of the policy, as `dpo.adapter: {adapter}` asks",
            "use `dpo.adapter: continue`",
            file=folder / ADAPTER_CONFIG,
            pointer="/dpo/adapter",
        )


def _require_plain(base: nn.Module, config: Any, folder: Path) -> None:
    """Raises: the adapter does not leave the base's weights as they are."""
    embeddings = getattr(base, "get_input_embeddings", lambda: None)()
    names = {id(module): name for name, module in base.named_modules()}
    changes = changes_of_base(base, config, folder)
    if config.trainable_token_indices or any(names.get(id(embeddings), "-") in change for change in changes):
        raise unsupported(
            "the SFT adapter comes with embeddings of its own, as tools save them that add tokens or resize the "
            "embeddings: policy and reference would share them, and the base has not got those tokens",
            "resize and save the base first, and train SFT on that; or train SFT without added tokens",
        )
    if config.bias != "none":  # these are frozen in DPO
        changes = [change for change in changes if not change.endswith(".bias")]
    if changes:
        rewritten = any("init_lora_weights" in change for change in changes)
        raise unsupported(
            f"the SFT adapter changes weights of the base, which policy and reference share: {some(changes)}",
            "save it as a plain LoRA: PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
            if rewritten
            else "start from a plain LoRA adapter on the model's blocks",
        )


def _fold(policy: Any, opened: list[str]) -> None:
    """The SFT adapter's LoRA within opened modules into their weights."""
    for name in opened:
        for module in policy.get_submodule(PREFIX + name).modules():
            if hasattr(module, "lora_A"):
                # What is not finite is refused, where there are values (a plan has none).
                module.merge(safe_merge=policy.device.type != "meta", adapter_names=["default"])


def _with_opened(
    policy: Any, config: Any, opened: list[str], kept: list[str], with_lora: list[str], pointer: str
) -> Any:
    """The same adapter on the blocks that are not opened, its LoRA on the opened ones folded into them.

    Taken apart, PEFT leaves its own copies of `modules_to_save` in the base: there those that are `kept` stay.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.constants import DUMMY_TARGET_MODULES

    left = [name for name in with_lora if not within(name, opened)]
    if with_lora and not left:
        raise PipelineError(
            "DPO opens every block that carries the SFT adapter's LoRA, so no adapter would be left",
            code="conflict",
            pointer=f"{pointer}/last_blocks",
            mend="open fewer blocks, or train what is opened alone with `dpo.adapter: frozen`",
        )
    weights = {
        name: weight.clone()
        for name, weight in get_peft_model_state_dict(policy, save_embedding_layers=False).items()
        if not within(name.removeprefix(PREFIX), [*opened, *kept])
    }
    _fold(policy, opened)
    folded = policy.unload()
    if kept and left:
        config.target_modules, config.layers_to_transform = sorted(left), None
    elif config.target_modules != DUMMY_TARGET_MODULES and not isinstance(config.target_modules, str):
        # PEFT takes no layers beside a pattern; opened modules are left out of one by themselves.
        blocks = anatomy_of(folded).blocks
        config.layers_to_transform = [at for at, block in enumerate(blocks) if any(within(n, [block]) for n in left)]
    config.modules_to_save = opened or None
    config.inference_mode = False
    stacked = get_peft_model(folded, config)
    state = get_peft_model_state_dict(stacked, save_embedding_layers=False)
    assert set(weights) <= set(state), "LoRA below the opened blocks is the SFT adapter's, key for key"
    set_peft_model_state_dict(stacked, state | weights)
    return stacked


def _with_fixed(policy: Any, opened: list[str], with_lora: list[str]) -> Any:
    """The base with the SFT adapter as a part of it: folded where blocks are opened, beside the weights elsewhere."""
    _fold(policy, opened)
    factors = {name: factors_of(policy.get_submodule(PREFIX + name)) for name in with_lora if not within(name, opened)}
    base = policy.unload()
    for name, (down, up) in factors.items():
        fix(base.get_submodule(name), down, up)
    return base


def unsupported(cause: str, mend: str = "start from a plain LoRA adapter on the blocks", **where: Any) -> PipelineError:
    """What is said of an adapter that DPO cannot start from."""
    return PipelineError(cause, code="unsupported-adapter", mend=mend, **where)
