from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from pipeline.plan.trace import Batch, trace_step
from pipeline.training.engine.joint import join
from pipeline.training.engine.linear import join_products
from pipeline.training.engine.padding_free import _dispatch_rows, padding_free_collator
from pipeline.training.engine.shared_prompt import SharedPrompt

BATCH = Batch(sequences=4, length=96, positions=200)
ROWS = ((96,), (40,), (60,), (20,))
PAIRS = ((50, 45, 20), (30, 10, 40))
"""Shared tokens and those of the branches, of sequences of 96 tokens at most: each ends in one more."""
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "vocab_size": 500,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN: dict[str, Any] = {
    "autocast": None,
    "checkpointing": None,
    "outputs": ("log_probs", "entropy", "is_top1"),
    "triton": False,
}


def llama(**changes: Any) -> Any:
    return LlamaConfig(**{**SMALL, **changes})


def policy_of(config: Any, device: str, dtype: torch.dtype = torch.float32, opened: Any = None) -> Any:
    lora = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM", modules_to_save=opened
    )
    with torch.device(device):
        return get_peft_model(AutoModelForCausalLM.from_config(config, dtype=dtype), lora).train()


def bytes_kept(policy: Any, step: Any, *, autocast: bool) -> int:
    """What the blocks' forward keeps for their backward, as autograd hands it over, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    join_products(policy, rounds=False)
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step(policy)
    return sum(size for size, _ in kept.values())


def padded(policy: Any) -> None:
    mask = torch.ones(BATCH.sequences, BATCH.length, dtype=torch.long)
    mask[0, -5:] = 0
    policy.get_base_model().base_model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)


def by_row_in_training(policy: Any) -> None:
    """As `leave_padding_out` switches the model, with TRL's own collator."""
    _dispatch_rows(policy.get_base_model().base_model)
    rows = [{"input_ids": [3] * length, "labels": [3] * length} for (length,) in ROWS]
    batch = padding_free_collator(0)(rows)
    del batch["labels"]
    policy.get_base_model().base_model(**batch, use_cache=False)


def joint_in_training(policy: Any) -> None:
    """As `SharedPrompt` runs the backbone for TRL's batch."""
    shared = SharedPrompt(policy)
    shared.install()
    # What is shared ends before the last common token; each sequence has one more token, that predicts nothing.
    chosen, rejected = ([[1] * (pair[0] + 1) + [token] * pair[at] for pair in PAIRS] for token, at in ((2, 1), (3, 2)))
    ids = torch.zeros(2 * len(PAIRS), max(map(len, chosen + rejected)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(chosen + rejected):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    joint = join(ids, mask, apart=True)  # the plan counts on nothing that pairs have in common
    assert joint.sizes == list(PAIRS)
    shared._joint_encode(joint=joint, input_ids=ids, attention_mask=mask, use_cache=False)


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
    assert traced.saved == pytest.approx(bytes_kept(make("cpu"), padded, autocast=half), rel=0.05)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize(("rows", "step"), [(ROWS, by_row_in_training), (PAIRS, joint_in_training)])
def test_what_the_engine_keeps_is_what_autograd_is_given(rows: Any, step: Any, window: int | None, half: bool) -> None:
    """And that is less than of the padded batch; a sliding window takes masks."""
    config = llama() if window is None else MistralConfig(**{**SMALL, "sliding_window": window})
    dtype = torch.bfloat16 if half else torch.float32
    batch = Batch(4, 96, 200, rows)
    how = {**PLAIN, "autocast": dtype if half else None}
    traced, plain = (trace_step(policy_of(config, "meta", dtype), one, **how) for one in (batch, batch.padded()))
    assert traced.saved == pytest.approx(bytes_kept(policy_of(config, "cpu", dtype), step, autocast=half), rel=0.05)
    assert traced.saved < 0.75 * plain.saved


def test_no_mask_without_storage_is_left_behind() -> None:
    config = MistralConfig(**{**SMALL, "sliding_window": 32})
    trace_step(policy_of(config, "meta"), Batch(4, 96, 200, ROWS), **PLAIN)
    by_row_in_training(policy_of(config, "cpu"))


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
        trace_step(policy_of(config, "meta"), Batch(4, 96, positions), **PLAIN).head for positions in (50, 120)
    )
    row = 32_768 * 4
    assert 70 * row < many - few < 2 * 70 * row  # a row of logits in float32 for each position
    opened = trace_step(policy_of(config, "meta", opened=["lm_head"]), Batch(4, 96, 50), **PLAIN).head
    gradient = 32_768 * 64 * 4
    assert gradient <= opened - few <= gradient + 10 * 50 * row  # and TRL's head keeps several such rows


def test_on_triton_the_head_is_one_tile_of_half_precision() -> None:
    """A tile of 200 positions; states and float32 gradients in the loss; the gradient of all states."""
    policy = policy_of(llama(), "meta", torch.bfloat16)
    step = trace_step(policy, BATCH, **{**PLAIN, "autocast": torch.bfloat16, "triton": True})
    assert step.head == 200 * 32_768 * 2 + 200 * 64 * (2 + 4) + 4 * 96 * 64 * 2


def test_gradients_of_weights_are_not_part_of_the_step() -> None:
    """They stay from step to step, and are counted beside the weights: here two whole blocks, 344 kB in float32."""
    opened = ["model.layers.2", "model.layers.3"]
    step = trace_step(policy_of(llama(), "meta", opened=opened), Batch(1, 2, 1), **PLAIN)
    assert 0 < step.peak - step.saved < 100_000


def test_flash_attention_is_followed_without_a_gpu() -> None:
    policy = policy_of(llama(), "meta", torch.bfloat16)
    policy.get_base_model().config._attn_implementation = "flash_attention_2"
    assert trace_step(policy, BATCH, **PLAIN).saved > 0
