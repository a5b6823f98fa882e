from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline.errors import PipelineError
from pipeline.experiment import Experiment, Model
from pipeline.experiment_file import load_experiment
from pipeline.model.base import find_base
from pipeline.model.scope import trainable_of
from pipeline.plan.outline import find_config, outline
from pipeline.plan.plan import plan
from pipeline.plan.table import print_plan
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft

OPENED = {"last_blocks": 1, "final_norm": True, "lm_head": True}


def experiment(**sections: Any) -> Experiment:
    return Experiment.model_validate({"name": "outlined", **sections})


def outlined(folder: Path, stage: Any = "sft", **sections: Any) -> Any:
    one = experiment(model={"id": str(folder)}, **sections)
    return outline(find_config(one.model, tokenizer=False), one, stage, torch.float32).policy


@pytest.fixture
def config_folder(tmp_path: Path) -> Callable[..., Path]:
    """A model folder that holds a configuration and nothing else."""

    def write(kind: str, architecture: str, **values: Any) -> Path:
        import transformers

        config = getattr(transformers, kind)(architectures=[architecture], **values)
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
        return folder

    return write


def test_qwen_3_5_4b_reads_as_published(config_folder: Callable[..., Path], console: Console, tmp_path: Path) -> None:
    """The line that a training of Qwen3.5-4B with rank 8 on these seven kinds of layer is published with. Three blocks
    of four, those of linear attention, have the last three kinds only."""
    folder = config_folder(
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        hidden_size=2560,
        intermediate_size=9216,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Short rows: this test is about the counts, and a step is traced as well.
    one = experiment(
        model={"id": str(folder), "device": "cpu"},
        scope={"lora": {"r": 8, "target_modules": targets}},
        sft={"per_device_train_batch_size": 1, "max_length": 16},
    )
    made = plan(one, tmp_path / "no-runs", console)
    print_plan(made, console)
    line = "trainable params: 10,616,832 || all params: 4,216,368,128 || trainable%: 0.2518"
    assert line in console.file.getvalue().splitlines()
    answer = made.as_dict()
    assert (answer["trainable_parameters"], answer["all_parameters"]) == (10_616_832, 4_216_368_128)
    assert answer["trainable_percent"] == 0.2518
    assert answer["modules"]["lora layers.*.self_attn.q_proj"] == 8
    assert answer["modules"]["lora layers.*.mlp.down_proj"] == 32


def test_counts_files_and_groups_are_those_that_training_reports(
    write_experiment: Callable[..., Path], console: Console, tmp_path: Path
) -> None:
    short = {"max_steps": 1, "warmup_steps": 0, "eval_strategy": "no", "save_strategy": "epoch"}
    path = write_experiment(scope={"unfreeze": {"final_norm": True}}, sft=short, dpo={**short, "unfreeze": OPENED})
    one = load_experiment(path).experiment
    root = tmp_path / "runs"
    stages = plan(one, root, console).stages
    for stage, run in (("sft", run_sft), ("dpo", run_dpo)):
        outcome = run(one, root, console)
        assert outcome.trainable.as_dict() == stages[stage].trainable.as_dict()
        assert outcome.trainable.unties_head == stages[stage].trainable.unties_head
        (checkpoint,) = outcome.run.glob("state/checkpoint-*")
        assert stages[stage].checkpoints == 1
        memory = stages[stage].memory
        # A safetensors file has a header of names and shapes, some 120 bytes a tensor.
        saved = (checkpoint / "adapter_model.safetensors").stat().st_size
        assert 0 < saved - memory.adapter_and_opened < 20_000
        assert saved == (outcome.run / "adapter/adapter_model.safetensors").stat().st_size
        assert not (checkpoint / "ref").exists()
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
        moments = sum(state[name].nbytes for state in optimizer for name in ("exp_avg", "exp_avg_sq"))
        assert moments == memory.optimizer


def test_the_policy_has_no_values_and_the_reference_its_own_copies(tiny_folder: Path) -> None:
    policy = outlined(tiny_folder, "dpo", dpo={"unfreeze": OPENED})
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}
    names = dict(policy.named_parameters())
    assert not any(parameter.requires_grad for name, parameter in names.items() if ".ref." in name)
    trained = {name for name, parameter in names.items() if parameter.requires_grad}
    assert {name.replace(".default.", ".ref.") for name in trained} == {name for name in names if ".ref." in name}


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "qkvo", "layers": "last-half"},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"r": 3, "layers": [0, 2]},
    ],
    ids=str,
)
def test_any_adapter_counts_as_on_a_model_with_weights(tiny_folder: Path, lora: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from pipeline.model.policy import new_policy
    from pipeline.model.scope import lora_config

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    scope = experiment(scope={"lora": lora}).scope
    expected = trainable_of(new_policy(base, lora_config(base, scope.lora, scope.unfreeze)))
    assert trainable_of(outlined(tiny_folder, scope={"lora": lora})) == expected


def test_opened_weights_and_adapter_are_float32_on_a_half_precision_base(tiny_folder: Path) -> None:
    one = experiment(model={"id": str(tiny_folder)}, scope={"unfreeze": OPENED})
    policy = outline(find_config(one.model, tokenizer=False), one, "sft", torch.bfloat16).policy
    parameters = list(policy.parameters())
    assert {parameter.dtype for parameter in parameters if parameter.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for parameter in parameters}


def test_opened_blocks_are_not_held_in_four_bits(tiny_folder: Path) -> None:
    one = experiment(model={"id": str(tiny_folder), "quantize": "nf4"}, scope={"unfreeze": {"last_blocks": 1}})
    made = outline(find_config(one.model, tokenizer=False), one, "sft", torch.float32)
    packed = {name for name, parameter in made.policy.named_parameters() if id(parameter) in made.quantized}
    assert len(packed) == 3 * 7  # the seven linear layers of the three blocks below
    assert not any(".layers.3." in name for name in packed)


@pytest.mark.parametrize("adapter", ["new", "frozen"])
def test_what_sft_left_is_a_fixed_part_where_dpo_does_not_train_it(tiny_folder: Path, adapter: str) -> None:
    """Rank 8 on three blocks: 8 * 512 weights a block, as the widths of a block's linear layers sum to 512."""
    policy = outlined(tiny_folder, "dpo", dpo={"unfreeze": OPENED, "adapter": adapter})
    fixed = sum(p.numel() for name, p in policy.named_parameters() if name.endswith((".fixed.down", ".fixed.up")))
    assert fixed == 3 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    trainable = trainable_of(policy)
    assert trainable.groups.get("adapter", 0) == (fixed if adapter == "new" else 0)
    assert trainable.groups["opened"] > 0


@pytest.mark.parametrize("adapter", ["continue", "new"])
def test_what_sft_opens_and_dpo_does_not_is_a_frozen_part(tiny_folder: Path, adapter: str) -> None:
    """SFT opens the last block and the head; DPO the final norm. The tied head has become a matrix of its own."""
    sections = {
        "data": {"demonstrations": {"train": "rows.jsonl"}},
        "sft": {"unfreeze": {"last_blocks": 1, "lm_head": True}},
        "dpo": {"unfreeze": {"final_norm": True}, "adapter": adapter},
    }
    policy = outlined(tiny_folder, "dpo", **sections)
    names = dict(policy.named_parameters())
    own, tied = (names[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert own is not tied
    trainable = trainable_of(policy)
    assert trainable.groups == {"adapter": 3 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)), "opened": 32}
    assert not any(p.requires_grad for name, p in names.items() if ".layers.3." in name or "lm_head" in name)


def test_an_adapter_that_peft_refuses_is_an_error_of_the_scope(config_folder: Callable[..., Path]) -> None:
    folder = config_folder(
        "MambaConfig", "MambaForCausalLM", vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    with pytest.raises(PipelineError, match="PEFT refuses this adapter on MambaForCausalLM") as caught:
        outlined(folder)
    assert caught.value.pointer == "/scope/lora"


def test_of_a_hub_model_only_small_files_are_fetched(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    commit = tmp_path / "0123abcd"
    commit.symlink_to(tiny_folder)

    def snapshot_download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (model, revision) == ("someone/model", "main")
        asked.append(allow_patterns)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hub = Model(id="someone/model", revision="main")
    files = find_config(hub, tokenizer=False)
    assert (files.id, files.folder, files.revision) == ("someone/model", commit, "0123abcd")
    find_config(hub, tokenizer=True)
    assert asked[0] == ["config.json"]
    assert "*.json" in asked[1]
    assert not any("safetensors" in pattern for pattern in asked[1])


@pytest.mark.parametrize(
    "model_id", ["someone/nothing-cached", "not an id", "./no-such-folder", "no-such.gguf", "builtin:other"]
)
def test_a_base_that_is_not_there_is_told_as_training_tells_it(model_id: str) -> None:
    with pytest.raises(PipelineError) as expected:
        find_base(Model(id=model_id))
    with pytest.raises(PipelineError) as caught:
        find_config(Model(id=model_id), tokenizer=False)
    assert caught.value.as_dict() == expected.value.as_dict()


def test_a_configuration_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}), encoding="utf-8")
    with pytest.raises(PipelineError) as caught:
        outlined(tmp_path)
    assert caught.value.code == "unloadable-model"
