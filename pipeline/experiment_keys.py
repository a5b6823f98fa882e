"""Which keys an experiment has in which section, and what a key that it does not have was meant to be."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from pipeline.experiment import Experiment

OTHER_NAMES = {
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "clip_grad_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "activation_checkpointing": "gradient_checkpointing",
    "evaluation_strategy": "eval_strategy",
    "lora_r": "scope.lora.r",
    "lora_rank": "scope.lora.r",
    "rank": "scope.lora.r",
    "alpha": "scope.lora.lora_alpha",
    "dropout": "scope.lora.lora_dropout",
    "lora_target_modules": "scope.lora.target_modules",
    "layers_to_transform": "scope.lora.layers",
    "modules_to_save": "scope.unfreeze",
    "dpo_beta": "dpo.beta",
    "pref_beta": "dpo.beta",
    "loss": "dpo.loss_type",
    "base_model": "model.id",
    "model_id": "model.id",
    "model_name": "model.id",
    "model_name_or_path": "model.id",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantize",
    "quantization": "model.quantize",
    "attn_impl": "model.attn_implementation",
    "chat_template_path": "tokenizer.chat_template",
    "dataset": "data.demonstrations.train",
    "train_file": "data.demonstrations.train",
    "max_tokens": "evaluation.max_new_tokens",
    "wandb_project": "tracking.wandb.project",
}
"""Names of other tools, or of earlier versions of the same, for our key or its whole path."""
_TOKENS = (
    "adding tokens or resizing the embeddings is not supported, since policy and reference would share the new rows: "
    "use tokens that the tokenizer has"
)
_NOTES = {
    "add_tokens": _TOKENS,
    "added_tokens": _TOKENS,
    "new_tokens": _TOKENS,
    "special_tokens": _TOKENS,
    "additional_special_tokens": _TOKENS,
    "resize_token_embeddings": _TOKENS,
    "trainable_token_indices": _TOKENS,
    "warmup_ratio": "use `warmup_steps`: a number below 1 is a share of all steps",
    "output_dir": "runs land in `checkpoints/`, in the folder that the top-level `name` names",
    "run_name": "the top-level `name` names the runs",
}


@cache
def sections() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The keys of every section by its path; `*` stands for any name: `("evaluation", "checks", "*")`."""
    return dict(_walk(Experiment, ()))


def _walk(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    yield path, tuple(model.model_fields)
    for key, field in model.model_fields.items():
        for below, inner in _models(field.annotation):
            yield from _walk(inner, (*path, key, *below))


def _models(annotation: Any) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """The sections that a value of this type can be, each with the path from the value to it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in {Union, types.UnionType, Annotated}:
        for argument in arguments:
            yield from _models(argument)
    elif origin is dict:
        for below, inner in _models(arguments[1]):
            yield ("*", *below), inner


def keys_of(path: Sequence[str]) -> tuple[str, ...]:
    """The keys of the section at `path`; none where there is no such section."""
    known = sections()
    named = (*path[:2], "*", *path[3:]) if tuple(path[:2]) == ("evaluation", "checks") else tuple(path)
    return known.get(named, ())


def is_known(key: str) -> bool:
    """Whether `key` is a key of some section, or another tool's name for one."""
    return key in _NOTES or key.lower() in OTHER_NAMES or bool(_homes(key))


def mend_for(path: Sequence[str], key: str, *, full: bool = False) -> str:
    """What to write in place of `key`, which the section at `path` does not have.

    Args:
        path: the keys that lead to the section.
        key: the wrong key.
        full: writes a key of the same section with the whole path before it, as `--set` needs it.
    """
    here = keys_of(path)
    before = "".join(f"{part}." for part in path) if full else ""
    if key in _NOTES:
        return _NOTES[key]
    *above, last = key.split(".")
    if above and last in keys_of(above):
        return f"write `{last}:` in the section `{'.'.join(above)}:`; dotted keys are for `--set`"
    other = OTHER_NAMES.get(key.lower())
    if other is not None:
        homes = [other] if "." in other else _homes(other)
        return f"did you mean `{before}{other}`?" if other in here else f"write it as {_or(homes)}"
    if homes := _homes(key):
        sections_of_it = [home.rpartition(".")[0] for home in homes]
        where = f"under {_or(sections_of_it)}" if sections_of_it != [""] else "at the top level"
        return f"`{key}` belongs {where}"
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        return f"did you mean `{before}{close[0]}`?"
    if elsewhere := difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.8):
        return f"did you mean {_or(_homes(elsewhere[0]))}?"
    listed = f"the keys of {'.'.join(path) or 'an experiment'} are {', '.join(here)}"
    if tuple(path) in {("sft",), ("dpo",)}:
        return f"other fields of TRL's {path[0].upper()}Config go under `{path[0]}.options`; {listed}"
    return listed


def _all_keys() -> list[str]:
    return sorted({key for keys in sections().values() for key in keys})


def _homes(key: str) -> list[str]:
    """Where `key` stands in an experiment, as dotted paths, the highest only."""
    paths = [(*path, key) for path, keys in sections().items() if key in keys]
    highest = min(map(len, paths), default=0)
    return [".".join(path).replace("*", "NAME") for path in paths if len(path) == highest]


def _or(names: list[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)
