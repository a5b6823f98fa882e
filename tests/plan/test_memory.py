from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.experiment import Experiment, Model
from pipeline.model.device import Placement
from pipeline.plan.memory import Memory, memory_of
from pipeline.plan.outline import find_config, outline
from pipeline.plan.trace import Batch

BATCH = Batch(sequences=2, length=16, positions=10)
LINEAR = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
NORMS = 9 * 32
"""Of the tiny model: four blocks of width 32 with keys and values of width 16, width 64 inside, a tied head."""
LORA = 4 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
"""Rank 4 on all seven linear layers of four blocks."""
BUFFERS = 2 * 4 * 4
"""The rotary frequencies of a head of width 8, which Transformers keeps twice."""


def planned(
    folder: Path, stage: Any = "sft", optim: str = "adamw_torch", dtype: Any = torch.float32, **sections: Any
) -> Memory:
    model = {"id": str(folder), **sections.pop("model", {})}
    one = Experiment.model_validate({"name": "sized", "scope": {"lora": {"r": 4}}, **sections, "model": model})
    made = outline(find_config(Model(id=str(folder)), tokenizer=False), one, stage, dtype)
    args = SimpleNamespace(
        optim=SimpleNamespace(value=optim),
        activation_checkpointing=False,
        activation_checkpointing_kwargs=None,
        disable_dropout=stage == "dpo",
    )
    return memory_of(made, BATCH, args, Placement(torch.device("cpu"), dtype), dpo=stage == "dpo")


@pytest.fixture
def vocabulary(tiny_tokenizer: Any) -> int:
    return len(tiny_tokenizer)


def test_an_adapter_takes_four_times_its_weights_in_float32(tiny_folder: Path, vocabulary: int) -> None:
    memory = planned(tiny_folder)
    assert memory.weights == 4 * (vocabulary * 32 + LINEAR + NORMS) + BUFFERS
    assert memory.adapter_and_opened == memory.gradients == 4 * LORA
    assert memory.optimizer == 8 * LORA
    assert memory.reference == 0
    assert memory.checkpoint == 12 * LORA
    assert memory.total == sum(part or 0 for part in memory.parts().values())


def test_the_reference_copies_the_adapter_and_what_is_opened(tiny_folder: Path, vocabulary: int) -> None:
    unfreeze = {"last_blocks": 1, "final_norm": True, "lm_head": True}
    memory = planned(tiny_folder, "dpo", dpo={"unfreeze": unfreeze})
    trained = LORA * 3 // 4 + LINEAR // 4 + 3 * 32 + vocabulary * 32
    assert memory.adapter_and_opened == memory.reference == 4 * trained
    # The frozen originals stay: the base is as large as before.
    assert memory.weights == 4 * (vocabulary * 32 + LINEAR + NORMS) + BUFFERS


def test_a_half_precision_base_has_a_float32_adapter(tiny_folder: Path, vocabulary: int) -> None:
    memory = planned(tiny_folder, dtype=torch.bfloat16)
    assert memory.weights == 2 * (vocabulary * 32 + LINEAR + NORMS) + BUFFERS
    assert memory.adapter_and_opened == 4 * LORA


def test_four_bits_hold_the_linear_layers_with_their_scales(tiny_folder: Path, vocabulary: int) -> None:
    """0.5 + 1/64 + 4/(64 * 256) bytes a weight; embeddings, head and norms stay, and so does the adapter."""
    memory = planned(tiny_folder, model={"quantize": "nf4"})
    assert memory.weights == pytest.approx(LINEAR * 0.515869140625 + 4 * (vocabulary * 32 + NORMS) + BUFFERS, abs=28)
    assert memory.adapter_and_opened == memory.gradients == 4 * LORA
    assert memory.optimizer == 8 * LORA


def test_eight_bit_moments_are_those_of_large_tensors_only(tiny_folder: Path, vocabulary: int) -> None:
    plain = planned(tiny_folder, scope={"lora": {"r": 4}, "unfreeze": {"lm_head": True}})
    spared = planned(tiny_folder, optim="adamw_8bit", scope={"lora": {"r": 4}, "unfreeze": {"lm_head": True}})
    head = vocabulary * 32  # the one tensor of 4,096 elements or more
    assert plain.optimizer == 8 * (LORA + head)
    assert spared.optimizer == 8 * LORA + 2 * head + 8 * head // 256


def test_a_part_that_cannot_be_followed_leaves_the_sum_unknown(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    def by_value(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        return input_ids[0, 0].item()

    monkeypatch.setattr(LlamaModel, "forward", by_value)
    memory = planned(tiny_folder)
    assert (memory.total, memory.logits, memory.activations) == (None, None, None)
    assert memory.why_unknown is not None
    assert "LlamaForCausalLM cannot be followed without values" in memory.why_unknown
    assert memory.weights > 0
