"""What `options` hands through to TRL, and what it does not."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from typing import Any, get_args

import pytest

from pipeline.errors import PipelineError
from pipeline.experiment import _F_DIVERGENCE, _LABEL_SMOOTHING, Dpo, LossType, Sft
from pipeline.trl_options import ELSEWHERE, REFUSED, REFUSED_IN_DPO, Stage, check_options, refused_options

OURS = {"adapter", "unfreeze", "options"}
"""Keys of a stage that are not TRL's."""

HANDED_THROUGH = {
    "activation_checkpointing_kwargs",
    "activation_offloading",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "average_tokens_across_devices",
    "data_seed",
    "dataloader_drop_last",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "debug",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_do_concat_batches",
    "eval_on_start",
    "eval_use_gather_object",
    "full_determinism",
    "gradient_checkpointing_kwargs",
    "include_num_input_tokens_seen",
    "length_column_name",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "pad_to_multiple_of",
    "prediction_loss_only",
    "router_aux_loss_coef",
    "save_on_each_node",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
}
HANDED_THROUGH_IN_SFT = HANDED_THROUGH | {"loss_type", "neftune_noise_alpha", "train_sampling_strategy"}
HANDED_THROUGH_IN_DPO = HANDED_THROUGH | {
    "discopop_tau",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "ld_alpha",
    "use_weighting",
}


def fields_of(stage: Stage) -> set[str]:
    import trl

    return {field.name for field in dataclasses.fields(trl.SFTConfig if stage == "sft" else trl.DPOConfig)}


def problem(stage: Stage, options: dict[str, Any]) -> PipelineError:
    (only,) = check_options(stage, options)
    assert only.pointer == f"/{stage}/options/{next(iter(options))}"
    return only


@pytest.mark.parametrize(("stage", "section"), [("sft", Sft), ("dpo", Dpo)])
def test_every_key_of_a_stage_is_a_field_of_trl(stage: Stage, section: type[Sft | Dpo]) -> None:
    assert set(section.model_fields) - OURS <= fields_of(stage)


@pytest.mark.parametrize(("stage", "expected"), [("sft", HANDED_THROUGH_IN_SFT), ("dpo", HANDED_THROUGH_IN_DPO)])
def test_it_is_decided_of_every_field_whether_it_is_handed_through(stage: Stage, expected: set[str]) -> None:
    """A field that a new TRL adds fails here until someone has decided."""
    assert {name for name in fields_of(stage) if not refused_options(stage, {name: None})} == expected


def test_nothing_is_refused_that_trl_does_not_have() -> None:
    assert (REFUSED.keys() | ELSEWHERE.keys()) - fields_of("sft") - fields_of("dpo") == set()
    assert REFUSED_IN_DPO.keys() <= fields_of("dpo")
    assert not REFUSED.keys() & ELSEWHERE.keys()


def test_the_losses_are_those_of_trl() -> None:
    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    branches = re.split(r'loss_type == "', source)[1:]
    by_name = {branch.partition('"')[0]: branch.partition("if self.use_weighting")[0] for branch in branches}
    assert set(get_args(LossType)) == by_name.keys()
    smoothed = {name for name, branch in by_name.items() if "self.label_smoothing" in branch}
    assert smoothed == _LABEL_SMOOTHING
    (divergences,) = re.findall(r"f_divergence_loss_types = \{(.*?)\}", inspect.getsource(DPOTrainer.__init__))
    assert set(re.findall(r'"(\w+)"', divergences)) == _F_DIVERGENCE


@pytest.mark.parametrize(
    ("stage", "options", "code", "says"),
    [
        ("sft", {"max_steps": 3}, "conflict", "write `max_steps:` under `sft:` itself"),
        ("dpo", {"beta": 0.1}, "conflict", "write `beta:` under `dpo:` itself"),
        ("dpo", {"seed": 3}, "conflict", "set the top-level `seed`"),
        ("dpo", {"bf16": True}, "conflict", "set `model.dtype`"),
        ("sft", {"packing": True}, "refused-option", "masks"),
        ("sft", {"remove_unused_columns": True}, "refused-option", "masked"),
        ("dpo", {"disable_dropout": False}, "refused-option", "dropout"),
        ("dpo", {"sync_ref_model": True}, "refused-option", "hold still"),
        ("dpo", {"neftune_noise_alpha": 5.0}, "refused-option", "noise"),
    ],
)
def test_a_refused_option_says_why_or_where(stage: Stage, options: dict[str, Any], code: str, says: str) -> None:
    found = problem(stage, options)
    assert found.code == code
    assert says in f"{found.message}; {found.mend}"


@pytest.mark.parametrize(
    ("stage", "options", "code", "says"),
    [
        ("sft", {"adam_beta_1": 0.9}, "unknown-key", "did you mean `adam_beta1`?"),
        ("sft", {"lerning_rate": 0.9}, "unknown-key", "did you mean `learning_rate`, directly under `sft`?"),
        ("sft", {"pakcing": True}, "unknown-key", "TRL's documentation of SFTConfig"),
        ("sft", {"warmup_ratio": 0.1}, "unknown-key", "warmup_steps"),
        ("sft", {"lora_r": 8}, "unknown-key", "`scope.lora.r`"),
        ("sft", {"beta": 0.1}, "unknown-key", "belongs under `dpo`"),
        ("sft", {"ld_alpha": 0.1}, "unknown-key", "no field of TRL's SFTConfig"),
        ("sft", {"adam_beta1": "0.9"}, "wrong-type", "a number"),
        ("sft", {"adam_beta1": True}, "wrong-type", "a number"),
        ("sft", {"data_seed": 1.0}, "wrong-type", "a whole number or null"),
        ("sft", {"data_seed": True}, "wrong-type", "a whole number or null"),
        ("sft", {"eval_on_start": 1}, "wrong-type", "true or false"),
        ("sft", {"optim": 3}, "wrong-type", "text"),
        ("sft", {"optim": "adamw_toch"}, "unknown-value", "did you mean `adamw_torch`?"),
        ("sft", {"loss_type": "nil"}, "unknown-value", "nll"),
        ("sft", {"lr_scheduler_kwargs": [1]}, "wrong-type", "a section of keys"),
        ("dpo", {"f_divergence_type": "reverse"}, "unknown-value", "`reverse_kl`"),
        ("sft", {"train_sampling_strategy": "randm"}, "unknown-value", "`random`"),
    ],
)
def test_names_and_types_are_trls(stage: Stage, options: dict[str, Any], code: str, says: str) -> None:
    found = problem(stage, options)
    assert found.code == code
    assert says in f"{found.message}; {found.mend}"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_is_handed_through(stage: Stage) -> None:
    options = {
        "adam_beta2": 0.95,
        "eval_delay": 1,  # an int is fine where a number is wanted
        "data_seed": None,
        "optim": "sgd",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "include_num_input_tokens_seen": "all",
        "dataloader_num_workers": 2,
    }
    assert check_options(stage, options) == []


def test_all_problems_are_found_at_once() -> None:
    options = {"adam_beta1": "x", "optim": "sgd", "zzz": 1, "packing": True, "max_steps": 3}
    found = {(problem.pointer, problem.code) for problem in check_options("sft", options)}
    assert found == {
        ("/sft/options/adam_beta1", "wrong-type"),
        ("/sft/options/zzz", "unknown-key"),
        ("/sft/options/packing", "refused-option"),
        ("/sft/options/max_steps", "conflict"),
    }


def test_trl_is_imported_only_where_a_name_has_to_be_looked_up() -> None:
    code = (
        "import sys; from pipeline.trl_options import check_options\n"
        "assert check_options('sft', {}) == [] and len(check_options('dpo', {'seed': 3})) == 1\n"
        "assert not {'trl', 'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
