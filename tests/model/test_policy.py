"""What DPO trains on top of an SFT adapter: a fresh one, opened weights alone; and what stock PEFT opens of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pipeline.errors import PipelineError
from pipeline.experiment import Lora, Unfreeze
from pipeline.model.adapter import adapter_config_sha256, save_adapter
from pipeline.model.policy import new_policy, open_policy
from pipeline.model.scope import lora_config

Make = Callable[..., Any]
Write = Callable[..., tuple[Path, torch.Tensor]]
Logits = Callable[[Any], torch.Tensor]

NOTHING = Unfreeze()
ALL = Unfreeze(last_blocks=1, final_norm=True, lm_head=True)
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:fan_in_fan_out is set to False")


def train(policy: Any) -> None:
    """Moves every weight that trains, as an optimizer would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def reference_of(policy: Any) -> None:
    """TRL's: a second adapter `ref` of the same configuration, a copy of `default`, name for name."""
    policy.add_adapter("ref", policy.peft_config["default"])
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("unfreeze", [NOTHING, ALL], ids=["lora", "opened"])
@pytest.mark.parametrize(
    ("kind", "changes", "sft", "lora"),
    [
        ("llama", TIED, {}, Lora(r=3, lora_alpha=12)),
        ("llama", TIED, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, Lora(r=3, target_modules="qkvo")),
        ("llama", TIED, {"layers_to_transform": [0]}, Lora(r=3, use_rslora=True)),
        ("llama", TIED, {}, Lora(r=3, init_lora_weights="pissa")),
        ("gpt2", {}, {"target_modules": ["c_attn"]}, Lora(r=3)),
    ],
    ids=["alike", "other-layers", "other-blocks", "pissa", "gpt2"],
)
def test_a_new_adapter_starts_at_the_sft_model_and_is_saved_as_one_with_it(
    make_model: Make,
    write_adapter: Write,
    logits_of: Logits,
    tiny_tokenizer: Any,
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
    sft: dict[str, Any],
    lora: Lora,
    unfreeze: Unfreeze,
) -> None:
    folder, expected = write_adapter(make_model(kind, **changes), **sft)
    policy = open_policy(make_model(kind, **changes), folder, unfreeze, adapter="new", lora=lora).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    assert not any(".fixed." in name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    reference_of(policy)
    train(policy)
    trained = logits_of(policy)
    assert (trained - expected).abs().max() > 0.1
    policy.set_adapter("ref")
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    policy.set_adapter("default")
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    reopened = PeftModel.from_pretrained(make_model(kind, **changes), tmp_path / "saved").eval()
    assert (logits_of(reopened) - trained).abs().max() < 1e-4
    assert (logits_of(reopened.merge_and_unload()) - trained).abs().max() < 1e-3


def test_the_ranks_of_a_new_adapter_and_the_sft_adapter_add_up(
    make_model: Make, write_adapter: Write, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """SFT: rank 4 on q, v and down. New: rank 3 on q and up. So 7 on q, 4 on v and down, 3 on up; scaled by one."""
    folder, _ = write_adapter(make_model())
    lora = Lora(r=3, target_modules=["q_proj", "up_proj"])
    policy = open_policy(make_model(), folder, NOTHING, adapter="new", lora=lora)
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    block = "base_model.model.model.layers.1."
    found = {name: len(weight) for name, weight in weights.items() if name.startswith(block) and "lora_A" in name}
    assert found == {
        f"{block}self_attn.q_proj.lora_A.weight": 7,
        f"{block}self_attn.v_proj.lora_A.weight": 4,
        f"{block}mlp.down_proj.lora_A.weight": 4,
        f"{block}mlp.up_proj.lora_A.weight": 3,
    }
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (7, 7, config["alpha_pattern"])


@pytest.mark.parametrize("changes", [TIED, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_with_the_adapter_frozen_only_what_is_opened_trains_and_the_adapter_is_saved_as_it_was(
    make_model: Make,
    write_adapter: Write,
    logits_of: Logits,
    tiny_tokenizer: Any,
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    folder, expected = write_adapter(make_model("llama", **changes))
    policy = open_policy(make_model("llama", **changes), folder, ALL, adapter="frozen").eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(names) == 9 + 1 + 1
    assert all(".modules_to_save.default." in name for name in names)
    train(policy)
    trained = logits_of(policy)
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    reopened = PeftModel.from_pretrained(make_model("llama", **changes), tmp_path / "saved").eval()
    assert (logits_of(reopened) - trained).abs().max() < 1e-4
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    kept = [name for name in before if ".layers.2." not in name]
    assert {name for name in after if "lora_" in name} == set(kept)
    for name in kept:
        scaling = 2.0 if "lora_B" in name else 1.0  # alpha 8 over rank 4, multiplied into B
        assert torch.equal(after[name], scaling * before[name])


def test_an_sft_adapter_without_lora_goes_on(
    make_model: Make, logits_of: Logits, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    sft = new_policy(make_model(), lora_config(make_model(), None, Unfreeze(last_blocks=1)))
    train(sft)
    expected = logits_of(sft.eval())
    save_adapter(sft, tiny_tokenizer, tmp_path / "sft")
    for adapter in ("continue", "frozen", "new"):
        policy = open_policy(make_model(), tmp_path / "sft", ALL, adapter=adapter, lora=Lora(r=2)).eval()
        assert (logits_of(policy) - expected).abs().max() < 1e-4
        has_lora = any("lora_A" in name for name, _ in policy.named_parameters())
        assert has_lora == (adapter == "new")


@pytest.mark.parametrize("changes", [TIED, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", ["continue", "new", "frozen"])
def test_what_sft_opened_and_dpo_does_not_holds_still_and_is_saved_along(
    make_model: Make, logits_of: Logits, tiny_tokenizer: Any, tmp_path: Path, changes: dict[str, Any], adapter: Any
) -> None:
    """SFT: LoRA on blocks 0 and 1; block 2, norm and head opened. DPO opens nothing, and puts no LoRA on block 2."""
    base = make_model("llama", **changes)
    sft = new_policy(base, lora_config(base, Lora(r=2), ALL))
    train(sft)
    expected = logits_of(sft.eval())
    save_adapter(sft, tiny_tokenizer, tmp_path / "sft")
    given: dict[str, Any] = {"adapter": adapter, "lora": Lora(r=3)}
    policy = open_policy(make_model("llama", **changes), tmp_path / "sft", NOTHING, **given).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    reference_of(policy)
    train(policy)
    trained = logits_of(policy)
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert bool(names) == (adapter != "frozen")
    assert all(".lora_" in name and ".layers.2." not in name for name in names)
    policy.set_adapter("ref")
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    policy.set_adapter("default")
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    reopened = PeftModel.from_pretrained(make_model("llama", **changes), tmp_path / "saved").eval()
    assert (logits_of(reopened) - trained).abs().max() < 1e-4
    kept = ("base_model.model.model.norm.weight", "base_model.model.lm_head.weight")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "saved"))
    assert all(torch.equal(before[name], after[name]) for name in kept)
    # Once more on what this left: now the block is opened again.
    again = open_policy(make_model("llama", **changes), tmp_path / "saved", ALL).eval()
    assert (logits_of(again) - trained).abs().max() < 1e-4


def test_a_part_of_a_block_that_dpo_does_not_open_is_refused(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model(), modules_to_save=["model.layers.2.mlp"])
    with pytest.raises(PipelineError, match=r"trained model.layers.2.mlp, and only whole blocks") as caught:
        open_policy(make_model(), folder, NOTHING)
    assert caught.value.code == "conflict"
    open_policy(make_model(), folder, Unfreeze(last_blocks=1))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", True])
def test_an_adapter_of_any_start_is_saved_as_one_that_stock_peft_opens_on_the_base(
    make_model: Make, logits_of: Logits, tiny_tokenizer: Any, tmp_path: Path, init: Any
) -> None:
    base = make_model()
    plain = logits_of(base)
    policy = new_policy(base, lora_config(base, Lora(r=4, init_lora_weights=init), NOTHING)).eval()
    assert (logits_of(policy) - plain).abs().max() < 1e-4
    train(policy)
    trained = logits_of(policy)
    assert (trained - plain).abs().max() > 0.1
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    reopened = PeftModel.from_pretrained(make_model(), tmp_path / "saved").eval()
    assert (logits_of(reopened) - trained).abs().max() < 1e-4
    again = open_policy(make_model(), tmp_path / "saved", ALL).eval()
    assert (logits_of(again) - trained).abs().max() < 1e-4


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("unfreeze", [NOTHING, ALL], ids=["lora", "opened"])
@pytest.mark.parametrize("adapter", ["continue", "new"])
def test_biases_that_sft_trained_hold_still_and_are_saved_along(
    make_model: Make,
    write_adapter: Write,
    logits_of: Logits,
    tiny_tokenizer: Any,
    tmp_path: Path,
    bias: str,
    unfreeze: Unfreeze,
    adapter: Any,
) -> None:
    folder, expected = write_adapter(make_model("llama", **BIASED), bias=bias)
    policy = open_policy(make_model("llama", **BIASED), folder, unfreeze, adapter=adapter, lora=Lora(r=2)).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    reference_of(policy)
    train(policy)
    trained = logits_of(policy)
    policy.set_adapter("ref")
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    policy.set_adapter("default")
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    reopened = PeftModel.from_pretrained(make_model("llama", **BIASED), tmp_path / "saved").eval()
    assert (logits_of(reopened) - trained).abs().max() < 1e-4


def test_a_dora_cannot_be_a_fixed_part(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model(), use_dora=True)
    with pytest.raises(PipelineError, match="use_dora") as caught:
        open_policy(make_model(), folder, ALL, adapter="frozen")
    assert (caught.value.code, caught.value.pointer) == ("unsupported-adapter", "/dpo/adapter")
    assert caught.value.file == str(folder / "adapter_config.json")


def test_a_rank_that_does_not_fit_the_weights_is_said(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model())
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 8}))
    with pytest.raises(PipelineError, match="size mismatch") as caught:
        open_policy(make_model(), folder, NOTHING)
    assert caught.value.code == "adapter-mismatch"


def test_an_adapter_that_comes_with_resized_embeddings_is_refused(make_model: Make, write_adapter: Write) -> None:
    from peft import LoraConfig, get_peft_model

    resized = make_model("llama", **TIED)
    resized.resize_token_embeddings(66)
    folder, _ = write_adapter(make_model("llama", **TIED))
    get_peft_model(resized, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        folder, save_embedding_layers=True
    )
    with pytest.raises(PipelineError, match="embeddings of its own") as caught:
        open_policy(make_model("llama", **TIED), folder, NOTHING)
    assert caught.value.code == "unsupported-adapter"
    assert "without added tokens" in caught.value.mend


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"lora_alpha": 16}, False),
        ({"use_rslora": True}, False),
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["v_proj", "q_proj", "down_proj"]}, True),  # a set, in any order
        ({"base_model_name_or_path": "elsewhere", "peft_version": "9"}, True),
        ({"lora_dropout": 0.5}, True),  # of training alone
    ],
)
def test_the_hash_of_a_configuration_is_that_of_its_function(
    make_model: Make, write_adapter: Write, change: dict[str, Any], same: bool
) -> None:
    folder, _ = write_adapter(make_model())
    before = adapter_config_sha256(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert (adapter_config_sha256(folder) == before) is same
