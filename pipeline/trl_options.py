"""What a stage's `options` may hand through to TRL's SFTConfig or DPOConfig.

Any field may, but for those that have a place of their own in the experiment, and those that would break what
a run promises: a reference that holds still, masks that are proven, a record that is complete, a run that can
be resumed and repeated. Which those are is known without TRL (`refused_options`); names and types are TRL's
own and take its import, some seconds: the stages check them before they load anything (`check_options`).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from pipeline.errors import PipelineError
from pipeline.experiment import Dpo, Sft
from pipeline.experiment_keys import is_known, mend_for
from pipeline.yaml_places import pointer_to

Stage = Literal["sft", "dpo"]
STAGES: tuple[Stage, ...] = ("sft", "dpo")

ELSEWHERE = {
    "output_dir": "the top-level `name`; runs land in `checkpoints/`",
    "seed": "the top-level `seed`",
    "activation_checkpointing": "`gradient_checkpointing`, in the stage's own section",
    "use_cpu": "`model.device`",
    "bf16": "`model.dtype`",
    "fp16": "`model.dtype`",
    "bf16_full_eval": "`model.dtype`",
    "fp16_full_eval": "`model.dtype`",
    "model_init_kwargs": "the keys of `model`",
    "trust_remote_code": "`model.trust_remote_code`",
    "chat_template_path": "`tokenizer.chat_template`",
    "report_to": "`tracking`",
    "run_name": "the top-level `name`",
    "project": "`tracking.wandb.project`",
    "label_smoothing_factor": "`dpo.label_smoothing`; SFT has none",
}
"""Fields whose place in the experiment has another name, or is outside the stage's section."""

_MASKS = "the rows are tokenized, and the loss is masked, before TRL sees them"
_PACKING = (
    "it fills a batch with more rows than `per_device_train_batch_size` says, whose masks and weights would differ"
)
_PADDING = "batches go without padding by themselves, wherever the model computes the same on them"
_RECORD = "`metrics.jsonl` is the record of the run, and has every logged step"
_HUB = "a run stays on this machine; its `adapter/` can be uploaded as it is"
_LAST = "a run's adapter is that of its last step, which its manifest and its metrics describe"
_RESUME = "a resumed run must go on as if it had not stopped"
_SHARDED = "sharding the model is not supported: the reference is not proven to hold still under it"
_COMPILED = "a compiled forward is not proven to give the same log-probabilities"
_KERNELS = "replaced kernels are not proven to give the same log-probabilities"
_TRACKING = "Weights & Biases is the tracker that is supported, under `tracking.wandb`"
_PRECOMPUTED = "the proof of the reference scores pairs that TRL's cache would not hold"
_MOVING = "the reference must hold still"
_BATCHES = "batches must be those that the experiment names, in the same order on every run"
_UNUSED = "the command decides what is run"

REFUSED = {
    "accelerator_config": _BATCHES,
    "auto_find_batch_size": "a step that does not fit in the memory is cut in halves by itself, its rows the same",
    "dataloader_in_order": _BATCHES,
    "assistant_only_loss": _MASKS,
    "completion_only_loss": _MASKS,
    "dataset_kwargs": _MASKS,
    "dataset_num_proc": _MASKS,
    "dataset_text_field": _MASKS,
    "label_names": _MASKS,
    "remove_unused_columns": _MASKS,
    "shuffle_dataset": "the sampler already draws the rows in the order of the seed",
    "truncation_mode": "a row longer than `max_length` is cut at its end, as the audit of the data counts on",
    "eval_packing": _PACKING,
    "packing": _PACKING,
    "packing_strategy": _PACKING,
    "padding_free": _PADDING,
    "eos_token": "the tokenizer is the model's own, and the masks count on its stop token",
    "pad_token": "the tokenizer is the model's own, and the masks do not read the padding token",
    "batch_eval_metrics": "no function computes metrics from logits here",
    "include_for_metrics": "no function computes metrics from logits here",
    "logging_first_step": _RECORD,
    "logging_nan_inf_filter": "a loss that is not a number must show in the record, not the last finite one",
    "logging_strategy": _RECORD,
    "disable_tqdm": "the command shows the progress itself",
    "trackio_bucket_id": _TRACKING,
    "trackio_space_id": _TRACKING,
    "trackio_static_space_id": _TRACKING,
    "push_to_hub": _HUB,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "load_best_model_at_end": _LAST,
    "metric_for_best_model": _LAST,
    "greater_is_better": _LAST,
    "enable_jit_checkpoint": "the command itself saves when it is told to stop",
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "save_only_model": _RESUME,
    "resume_from_checkpoint": "the command resumes a run, after checking that its state is whole",
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "parallelism_config": _SHARDED,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "liger_kernel_config": _KERNELS,
    "use_liger_kernel": _KERNELS,
    "tf32": "a cached reference is not keyed on it, so that policy and reference could differ in precision",
    "use_cache": "training reads no key-value cache, and would keep one in memory",
    "optim_target_modules": "what is trained is `scope`'s to say",
    "do_eval": _UNUSED,
    "do_predict": _UNUSED,
    "do_train": _UNUSED,
    "local_rank": "the launcher sets it",
}
"""Fields that would break a promise in either stage, each with the reason."""

REFUSED_IN_DPO = {
    "disable_dropout": "policy and reference are compared without dropout",
    "neftune_noise_alpha": "its noise would differ between policy and reference",
    "precompute_ref_batch_size": _PRECOMPUTED,
    "precompute_ref_log_probs": _PRECOMPUTED,
    "ref_model_mixup_alpha": _MOVING,
    "ref_model_sync_steps": _MOVING,
    "sync_ref_model": _MOVING,
    "train_sampling_strategy": "a pair has no one length to group by",
}
"""Fields that would break a promise of DPO's."""

_CHOICES = {
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}
"""Values that TRL and Transformers check only once the model is loaded."""


def refused_options(stage: Stage, options: Mapping[str, Any]) -> list[PipelineError]:
    """The problems of `options` that are known without importing TRL: keys that have another place, or none.

    Args:
        stage: the section that holds them.
        options: as written under it.
    """
    section = Sft if stage == "sft" else Dpo
    reasons = REFUSED | (REFUSED_IN_DPO if stage == "dpo" else {})
    problems = []
    for name in options:
        if name in section.model_fields:
            mend = f"write `{name}:` under `{stage}:` itself"
            problems.append(_problem(stage, name, "conflict", f"`{name}` is a key of `{stage}`", mend))
        elif name in ELSEWHERE:
            cause = f"`{name}` is set elsewhere in the experiment"
            problems.append(_problem(stage, name, "conflict", cause, f"set {ELSEWHERE[name]}"))
        elif name in reasons:
            cause = f"`{name}` is not handed through: {reasons[name]}"
            problems.append(_problem(stage, name, "refused-option", cause, "remove the line"))
    return problems


def check_options(stage: Stage, options: Mapping[str, Any]) -> list[PipelineError]:
    """All problems of `options`: those of `refused_options`, names that TRL does not have, and wrong types.

    Imports TRL. The problems have pointers; `LoadedExperiment.placed` gives them file and line.

    Args:
        stage: the section that holds them.
        options: as written under it.
    """
    problems = refused_options(stage, options)
    known = {problem.pointer for problem in problems}
    names = [name for name in options if pointer_to(stage, "options", name) not in known]
    if not names:
        return problems
    config = _config(stage)
    fields = {field.name: field for field in dataclasses.fields(config)}
    annotations = typing.get_type_hints(config)
    for name in names:
        if name not in fields:
            mend = _mend_for_unknown(stage, name, list(fields))
            cause = f"`{name}` is no field of TRL's {config.__name__}"
            problems.append(_problem(stage, name, "unknown-key", cause, mend))
            continue
        choices = _choices(name, annotations[name], fields[name].metadata)
        value = options[name]
        if isinstance(value, str) and choices and value not in choices:
            close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
            mend = f"did you mean `{close[0]}`?" if close else "write one of them"
            cause = f"`{name}` must be one of {', '.join(choices)}; got `{value}`"
            problems.append(_problem(stage, name, "unknown-value", cause, mend))
        elif not _fits(value, annotations[name]):
            cause = f"`{name}` must be {_in_words(annotations[name])}; got {value!r}"
            mend = f"see `{name}` of TRL's {config.__name__}"
            problems.append(_problem(stage, name, "wrong-type", cause, mend))
    return problems


def _config(stage: Stage) -> type[Any]:
    if stage == "sft":
        from trl import SFTConfig

        return SFTConfig  # type: ignore[no-any-return]
    from trl import DPOConfig

    return DPOConfig  # type: ignore[no-any-return]


def _problem(stage: Stage, name: str, code: str, cause: str, mend: str) -> PipelineError:
    return PipelineError(cause, code=code, mend=mend, pointer=pointer_to(stage, "options", name))


def _mend_for_unknown(stage: Stage, name: str, fields: list[str]) -> str:
    section = Sft if stage == "sft" else Dpo
    offered = [field for field in fields if not refused_options(stage, {field: None})]
    close = difflib.get_close_matches(name, [*offered, *section.model_fields], n=1, cutoff=0.75)
    if close and close[0] in section.model_fields:
        return f"did you mean `{close[0]}`, directly under `{stage}`?"
    if close:
        return f"did you mean `{close[0]}`?"
    if is_known(name):
        return f"not under `options`: {mend_for((stage,), name)}"
    return f"its fields are in TRL's documentation of {'SFTConfig' if stage == 'sft' else 'DPOConfig'}"


def _choices(name: str, annotation: Any, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The values that text can take; empty where any will do."""
    if name in _CHOICES:
        return _CHOICES[name]
    if metadata.get("choices"):
        return tuple(metadata["choices"])
    return tuple(
        str(member.value)
        for part in _parts(annotation)
        if isinstance(part, type) and issubclass(part, Enum)
        for member in part
    )


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation alone where it is none."""
    return get_args(annotation) if get_origin(annotation) in {typing.Union, types.UnionType} else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether `value`, plain data, is of the annotated type; an int is fine where a float is wanted."""
    for part in _parts(annotation):
        origin = get_origin(part) or part
        if origin is Literal and value in get_args(part):
            return True
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if isinstance(origin, type) and isinstance(value, origin) and (origin is bool) == isinstance(value, bool):
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            arguments = get_args(part)
            if not arguments or all(_fits(item, arguments[-1]) for item in inside):
                return True
        if part is Any:
            return True
    return False


def _in_words(annotation: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    words |= {list: "a list", dict: "a section of keys"}
    named = [words.get(get_origin(part) or part, "") for part in _parts(annotation)]
    return " or ".join(word for word in dict.fromkeys(named) if word)
