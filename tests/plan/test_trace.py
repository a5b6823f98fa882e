from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from pipeline.plan.trace import Batch, trace_step

BATCH = Batch(sequences=4, length=96, positions=200)
PLAIN: dict[str, Any] = {
    "with_reference": False,
    "autocast": None,
    "checkpointing": None,
    "outputs": ("log_probs", "entropy", "is_top1"),
    "triton": False,
}


def llama(**changes: Any) -> Any:
    values = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 500, **changes}
    return LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **values)


def policy_of(config: Any, device: str, dtype: torch.dtype = torch.float32, opened: Any = None) -> Any:
    lora = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM", modules_to_save=opened
    )
    with torch.device(device):
        return get_peft_model(AutoModelForCausalLM.from_config(config, dtype=dtype), lora).train()


def bytes_kept(policy: Any, *, autocast: bool) -> int:
    """What the blocks' forward keeps for their backward, as autograd hands it over, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    mask = torch.ones(BATCH.sequences, BATCH.length, dtype=torch.long)
    mask[0, -5:] = 0
    ids = torch.zeros_like(mask)
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy.get_base_model().base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("name", "half"),
    [(name, half) for name in ("llama", "gpt2", "gemma3_text", "qwen3_5_text") for half in (False, True)]
    + [("mixtral", True)],  # PyTorch's grouped product has no fake form in float32
)
def test_what_is_kept_is_what_autograd_is_given(name: str, half: bool) -> None:
    small = {
        "llama": llama,
        "gpt2": lambda: AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=2, vocab_size=500),
        "gemma3_text": lambda: AutoConfig.for_model(
            "gemma3_text", hidden_size=64, intermediate_size=160, num_hidden_layers=3, vocab_size=500, head_dim=16
        ),
        "qwen3_5_text": lambda: AutoConfig.for_model(
            "qwen3_5_text",
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            vocab_size=500,
        ),
        "mixtral": lambda: MixtralConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=500,
            num_local_experts=4,
        ),
    }[name]()
    dtype = torch.bfloat16 if half else torch.float32
    lora = {"target_modules": ["c_attn"]} if name == "gpt2" else {"target_modules": ["q_proj", "v_proj"]}

    def make(device: str) -> Any:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(small, dtype=dtype)
            return get_peft_model(base, LoraConfig(r=8, lora_dropout=0.1, task_type="CAUSAL_LM", **lora)).train()

    traced = trace_step(make("meta"), BATCH, **{**PLAIN, "autocast": torch.bfloat16 if half else None})
    # The trace also holds what lives a little longer than autograd needs it: the mask, the last states.
    assert traced.saved == pytest.approx(bytes_kept(make("cpu"), autocast=half), rel=0.05)


def test_checkpointing_keeps_the_input_of_each_block_and_works_in_one() -> None:
    blocks, states = 4, 4 * 96 * 64 * 4
    plain = trace_step(policy_of(llama(), "meta"), BATCH, **PLAIN)
    spared = trace_step(policy_of(llama(), "meta"), BATCH, **{**PLAIN, "checkpointing": {}})
    # The inputs of four blocks, the output of the last, and the final norm's own: three tensors of its size and more.
    assert blocks * states <= spared.saved <= (blocks + 6) * states
    assert plain.saved > 3 * spared.saved
    one_block = (plain.saved - spared.saved) / blocks
    assert spared.peak - spared.saved > 0.8 * one_block
    assert spared.head == plain.head


def test_every_other_layer_lies_between() -> None:
    sizes = [
        trace_step(policy_of(llama(), "meta"), BATCH, **{**PLAIN, "checkpointing": setting}).saved
        for setting in ({}, {"every_n_layers": 2}, None)
    ]
    assert sizes == sorted(sizes)
    assert sizes[1] == pytest.approx((sizes[0] + sizes[2]) / 2, rel=0.1)


def test_the_head_grows_with_positions_up_to_a_tile_and_with_an_open_head() -> None:
    config = llama(vocab_size=32_768)
    few, many = (
        trace_step(policy_of(config, "meta"), Batch(4, 96, positions), **PLAIN).head for positions in (50, 200)
    )
    # Each position has a row of logits in float32, in several tensors at once.
    assert 150 * 32_768 * 4 < many - few < 150 * 32_768 * 4 * 10
    opened = trace_step(policy_of(config, "meta", opened=["lm_head"]), Batch(4, 96, 50), **PLAIN).head
    gradient = 32_768 * 64 * 4
    assert gradient <= opened - few <= 3 * gradient


def test_on_triton_the_head_is_one_tile_of_half_precision() -> None:
    """A tile of 200 positions; states and float32 gradients in the loss; the gradient of all states."""
    policy = policy_of(llama(), "meta", torch.bfloat16)
    step = trace_step(policy, BATCH, **{**PLAIN, "autocast": torch.bfloat16, "triton": True})
    assert step.head == 200 * 32_768 * 2 + 200 * 64 * (2 + 4) + 4 * 96 * 64 * 2


def test_the_reference_works_beside_what_the_policy_keeps() -> None:
    one_position = Batch(4, 96, 1)  # so that the head is not what takes the most
    alone, both = (
        trace_step(policy_of(llama(), "meta"), one_position, **{**PLAIN, "with_reference": reference})
        for reference in (False, True)
    )
    assert both.saved == alone.saved
    # One block's forward: gate, its activation, up and their product, `[4, 96, 160]` float32 each.
    assert both.peak - both.saved == pytest.approx(4 * 4 * 96 * 160 * 4, rel=0.25)
    assert both.peak > alone.peak


def test_gradients_of_weights_are_not_part_of_the_step() -> None:
    """They stay from step to step, and are counted beside the weights: here two whole blocks, 344 kB in float32."""
    opened = ["model.layers.2", "model.layers.3"]
    step = trace_step(policy_of(llama(), "meta", opened=opened), Batch(1, 2, 1), **PLAIN)
    # A tile of logits for one position, 131 kB, is the most then.
    assert 131_072 < step.head < 200_000
    assert step.peak == step.saved + step.head


def test_flash_attention_is_followed_without_a_gpu() -> None:
    policy = policy_of(llama(), "meta", torch.bfloat16)
    policy.get_base_model().config._attn_implementation = "flash_attention_2"
    assert trace_step(policy, BATCH, **PLAIN).saved > 0
