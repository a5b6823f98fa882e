from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.model.anatomy import anatomy_of, linear_layers

LLAMA_LAYERS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
NEOX_LAYERS = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
PHI3_LAYERS = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
GPT2_LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("kind", "blocks", "norm", "layers"),
    [
        ("llama", "model.layers", "model.norm", LLAMA_LAYERS),
        ("qwen2", "model.layers", "model.norm", LLAMA_LAYERS),
        ("qwen3", "model.layers", "model.norm", LLAMA_LAYERS),
        ("mistral", "model.layers", "model.norm", LLAMA_LAYERS),
        ("gemma3_text", "model.layers", "model.norm", LLAMA_LAYERS),
        ("phi3", "model.layers", "model.norm", PHI3_LAYERS),
        ("gpt2", "transformer.h", "transformer.ln_f", GPT2_LAYERS),
        ("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm", NEOX_LAYERS),
        ("mixtral", "model.layers", "model.norm", LLAMA_LAYERS[:4]),  # the experts are no linear layers but tensors
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_parts_of_each_architecture(
    make_model: Callable[..., Any], kind: str, blocks: str, norm: str, layers: list[str], tied: bool
) -> None:
    model = make_model(kind, tie_word_embeddings=tied)
    anatomy = anatomy_of(model)
    assert anatomy.blocks == (f"{blocks}.0", f"{blocks}.1", f"{blocks}.2")
    assert anatomy.final_norm == norm
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()
    assert anatomy.head_is_tied is tied
    for block in anatomy.blocks:
        assert sorted(linear_layers(model, block)) == sorted(layers)


def test_a_norm_before_the_blocks_is_the_final_one_where_its_name_says_so(make_model: Callable[..., Any]) -> None:
    """OPT registers its final norm before its blocks, where BLOOM has the norm of its embeddings."""
    from transformers import AutoModelForCausalLM, BloomConfig

    anatomy = anatomy_of(make_model("opt"))
    assert anatomy.blocks == tuple(f"model.decoder.layers.{index}" for index in range(3))
    assert anatomy.final_norm == "model.decoder.final_layer_norm"
    assert anatomy_of(make_model("opt", do_layer_norm_before=False)).final_norm is None
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    assert anatomy_of(bloom).final_norm == "transformer.ln_f"


def test_a_vision_tower_of_as_many_blocks_is_not_mistaken_for_the_decoder() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**width, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**width, "image_size": 28, "patch_size": 14}
    anatomy = anatomy_of(Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)))
    assert anatomy.blocks == ("model.language_model.layers.0", "model.language_model.layers.1")
    assert anatomy.final_norm == "model.language_model.norm"


def test_a_model_without_a_list_of_blocks_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    model.model.layers.append(nn.Identity())
    with pytest.raises(PipelineError) as caught:
        anatomy_of(model)
    assert caught.value.code == "unknown-architecture"
    assert "LlamaForCausalLM has no list of 3 blocks" in caught.value.message


def test_a_head_that_was_tied_and_no_longer_is(make_model: Callable[..., Any]) -> None:
    """What counts is the weight, not what the configuration says."""
    model = make_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 32))
    assert anatomy_of(model).head_is_tied is False
