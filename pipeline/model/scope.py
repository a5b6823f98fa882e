"""The trainable scope: the LoRA configuration, the opened weights, and the account of what trains.

PEFT ignores an entry of `target_modules` that matches nothing as long as another one matches, and takes
`modules_to_save: [norm]` for every `*_layernorm`. Here every entry is matched against the model first, and opened
modules are given by their full names.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.errors import PipelineError
from pipeline.experiment import Lora, Unfreeze
from pipeline.model.anatomy import Anatomy, anatomy_of, linear_layers

_ATTENTION = {"qv": ("q_proj", "v_proj"), "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj")}
_FUSED = {
    "qkv_proj": "o_proj",  # Phi-3
    "c_attn": "attn.c_proj",  # GPT-2
    "query_key_value": "attention.dense",  # GPT-NeoX, Falcon, BLOOM
}
"""Layers that hold queries, keys and values in one, and the output projection that goes with each."""
REFERENCE = "ref"
"""The name that TRL's DPOTrainer gives the frozen copy of the policy's adapter."""


def opened_modules(anatomy: Anatomy, unfreeze: Unfreeze, pointer: str = "/scope/unfreeze") -> list[str]:
    """Full names of the modules that `unfreeze` opens, for PEFT's `modules_to_save`.

    Args:
        anatomy: of the model.
        unfreeze: what is asked for.
        pointer: where in the experiment that stands.

    Raises:
        PipelineError: the model has no such module, or not so many blocks.
    """
    if unfreeze.last_blocks > len(anatomy.blocks):
        raise PipelineError(
            f"`last_blocks: {unfreeze.last_blocks}` opens more blocks than the model has ({len(anatomy.blocks)})",
            code="out-of-range",
            pointer=f"{pointer}/last_blocks",
            mend=f"open at most {len(anatomy.blocks)}",
        )
    opened = list(anatomy.blocks[len(anatomy.blocks) - unfreeze.last_blocks :])
    for wanted, name, key in (
        (unfreeze.final_norm, anatomy.final_norm, "final_norm"),
        (unfreeze.lm_head, anatomy.head, "lm_head"),
    ):
        if wanted and name is None:
            raise PipelineError(
                f"the model has no {key.replace('_', ' ')} to open",
                code="no-such-module",
                pointer=f"{pointer}/{key}",
                mend=f"set `{key}: false`",
            )
        if wanted and name is not None:
            opened.append(name)
    return opened


def lora_config(
    model: Any,
    lora: Lora | None,
    unfreeze: Unfreeze,
    revision: str | None = None,
    *,
    pointer: str = "/scope/unfreeze",
    kept: Sequence[str] = (),
) -> Any:
    """PEFT's LoraConfig for this model: LoRA on the blocks that are not opened, opened modules saved whole.

    Args:
        model: the base, before any adapter.
        lora: the adapter; None: opened weights alone, in an adapter that has no LoRA.
        unfreeze: what is opened beside it.
        revision: commit of a hub model, kept in the adapter's configuration.
        pointer: where `unfreeze` stands in the experiment.
        kept: modules that an earlier stage opened, which take no LoRA either: they are saved whole.

    Raises:
        PipelineError: an entry of `target_modules` or `layers` matches nothing, or nothing is left to train.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    anatomy = anatomy_of(model)
    opened = opened_modules(anatomy, unfreeze, pointer)
    given: dict[str, Any] = {"task_type": "CAUSAL_LM", "modules_to_save": opened or None, "revision": revision}
    if lora is None:
        return LoraConfig(**given, target_modules=DUMMY_TARGET_MODULES)
    layers = [index for index in _layers(anatomy, lora) if anatomy.blocks[index] not in (*opened, *kept)]
    if not layers:
        raise PipelineError(
            "every block with LoRA is opened whole as well, so the adapter has no layer left",
            code="conflict",
            pointer="/scope/lora/layers",
            mend="open fewer blocks, put LoRA on more layers, or set `scope.lora: null` to train opened weights alone",
        )
    targets, exact = _targets(model, anatomy, lora, layers)
    given |= {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.init_lora_weights,
    }
    everywhere = len(layers) == len(anatomy.blocks)
    config = LoraConfig(**given, target_modules=targets, layers_to_transform=None if everywhere else layers)
    if _matched(model, config) != set(exact):
        # Another part of the model has layers of these names, such as a vision tower: then each is named in full.
        config = LoraConfig(**given, target_modules=sorted(exact))
    return config


def _layers(anatomy: Anatomy, lora: Lora) -> list[int]:
    depth = len(anatomy.blocks)
    if lora.layers == "all":
        return list(range(depth))
    if lora.layers == "last-half":
        return list(range(depth // 2, depth))
    outside = [index for index in lora.layers if index >= depth]
    if outside:
        raise PipelineError(
            f"the model has blocks 0 to {depth - 1}, and `layers` names {outside[0]}",
            code="out-of-range",
            pointer="/scope/lora/layers",
            mend=f"name blocks from 0 to {depth - 1}; did you mean {depth - 1}?",
        )
    return sorted(set(lora.layers))


def _targets(model: Any, anatomy: Anatomy, lora: Lora, layers: list[int]) -> tuple[list[str], list[str]]:
    """The entries for PEFT's `target_modules`, and the full names of the layers that they mean."""
    # The blocks may differ (hybrid and MoE models), so names are gathered over all of them.
    inside = {anatomy.blocks[index]: linear_layers(model, anatomy.blocks[index]) for index in layers}
    names = {name for found in inside.values() for name in found}
    leaves = sorted({name.rpartition(".")[2] for name in names})
    wanted = leaves if lora.target_modules == "all-linear" else _wanted(lora, names, leaves)
    exact = [f"{block}.{name}" for block, found in inside.items() for name in found if _named(name, wanted)]
    return wanted, exact


def _wanted(lora: Lora, names: set[str], leaves: list[str]) -> list[str]:
    if isinstance(lora.target_modules, str):
        wanted: list[str] = list(_ATTENTION[lora.target_modules])
        fused = [name for name in leaves if name in _FUSED]
        if fused and not any(_named(name, wanted[:1]) for name in names):
            wanted = [fused[0], _FUSED[fused[0]]]
            if lora.target_modules == "qv":
                raise PipelineError(
                    f"queries, keys and values are one layer of this model, `{fused[0]}`, so `qv` has no keys to spare",
                    code="no-such-module",
                    pointer="/scope/lora/target_modules",
                    mend=f"list `[{fused[0]}]`; or use `qkvo`, which takes {' and '.join(wanted)}",
                )
    else:
        wanted = lora.target_modules
    for entry in wanted:
        if not any(_named(name, [entry]) for name in names):
            near = difflib.get_close_matches(entry, leaves, n=1) if isinstance(lora.target_modules, list) else []
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise PipelineError(
                f"no linear layer of the model is called `{entry}`",
                code="no-such-module",
                pointer="/scope/lora/target_modules",
                mend=f"{hint}list some of {', '.join(leaves)}; or use `all-linear`",
            )
    return sorted(set(wanted))


def _named(name: str, entries: list[str]) -> bool:
    """Whether PEFT takes `name` for one of `entries`: it is one, or ends in one behind a dot."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _matched(model: nn.Module, config: Any) -> set[str]:
    """Full names of the modules that PEFT would put LoRA on."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name) is True}


@dataclass(frozen=True)
class Trainable:
    """What trains: the account that is printed before the first step and kept in the manifest."""

    parameters: int
    all_parameters: int
    """Of the model as it is saved: without the reference, and an opened module counted once."""
    groups: dict[str, int]
    """Trainable parameters of the `adapter` and of what is `opened`."""
    modules: dict[str, int]
    """Trainable modules by kind, counted: `lora layers.*.self_attn.q_proj` -> 30."""
    unties_head: bool
    """Whether a head that was tied to the embeddings is opened, and so becomes a matrix of its own."""
    beyond_lora: dict[str, int]
    """Tensors of the blocks that no LoRA reaches since no linear layer holds them, counted by kind: the experts of a
    mixture that are one tensor (`layers.*.mlp.experts.down_proj`), convolutions of linear attention."""

    @property
    def percent(self) -> float:
        """Share of all parameters, in percent."""
        return 100 * self.parameters / self.all_parameters

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`; the key names are those of `pipeline plan`."""
        return {
            "trainable_parameters": self.parameters,
            "all_parameters": self.all_parameters,
            "trainable_percent": round(self.percent, 4),
            "groups": self.groups,
            "modules": self.modules,
            **({"beyond_lora": self.beyond_lora} if self.beyond_lora else {}),
        }


def is_opened(name: str) -> bool:
    """Whether a parameter of a PEFT model belongs to a module that was opened whole."""
    return ".modules_to_save." in f".{name}"


def trainable_of(model: Any) -> Trainable:
    """The account of a PEFT model.

    Raises:
        PipelineError: nothing trains, or everything does although only an adapter was asked for.
    """
    groups: Counter[str] = Counter()
    trained: set[str] = set()
    beyond: list[str] = []
    total = 0
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name or ".original_module." in name:
            continue
        total += _weights_in(parameter)
        if parameter.requires_grad:
            groups["opened" if is_opened(name) else "adapter"] += parameter.numel()
            trained.add(_trained_module(name))
        elif parameter.ndim > 2:
            beyond.append(_bare(name))
    modules = _by_kind(trained)
    trainable = sum(groups.values())
    if trainable == 0:
        raise PipelineError(
            "no parameter of the model is trainable (0 %)",
            code="nothing-trainable",
            pointer="/scope",
            mend="check `scope.lora.target_modules` and `scope.lora.layers`",
        )
    if not groups["opened"] and trainable == total:
        raise PipelineError(
            "every parameter of the model is trainable (100 %), and the scope asks for a LoRA adapter only",
            code="everything-trainable",
            pointer="/scope",
            mend="the base must be frozen: load it without an adapter that opens it",
        )
    unties_head = hasattr(model.get_output_embeddings(), "modules_to_save") and model.config.tie_word_embeddings
    in_blocks = {kind: count for kind, count in _by_kind(beyond).items() if ".*." in kind and groups["adapter"]}
    return Trainable(trainable, total, dict(groups), modules, unties_head, in_blocks)


def _by_kind(names: Iterable[str]) -> dict[str, int]:
    """How many of the names are alike but for the numbers in them: `layers.*.mlp` -> 30."""
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", f"{name}.").rstrip(".") for name in names)
    return dict(sorted(kinds.items()))


def _weights_in(parameter: nn.Parameter) -> int:
    """Its elements; bitsandbytes packs two 4-bit weights into a byte of storage."""
    packed = hasattr(parameter, "quant_storage")
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


def _trained_module(name: str) -> str:
    """`lora layers.3.self_attn.q_proj` or `opened layers.29` for the name of a trainable parameter."""
    if is_opened(name):
        return f"opened {_bare(name.split('.modules_to_save.')[0])}"
    return f"lora {_bare(name.split('.lora_')[0])}"


def _bare(module: str) -> str:
    return re.sub(r"^(base_model|model|transformer|gpt_neox)\.", "", re.sub(r"^base_model\.model\.", "", module))
