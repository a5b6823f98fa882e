"""A block of the random Llama (width 32, 4 heads on 2 key-value heads, feed-forward 64) holds, in weights,

    q 32·32  k 16·32  v 16·32  o 32·32  gate, up 64·32 each  down 32·64  two norms of 32   = 9,280

and a LoRA of rank r on a layer of `out` x `in` holds r·(in + out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pipeline.errors import PipelineError
from pipeline.experiment import Lora, Unfreeze
from pipeline.model.anatomy import Anatomy, anatomy_of
from pipeline.model.precision import hold_in_float32
from pipeline.model.scope import is_opened, lora_config, opened_modules, trainable_of

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*")

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK = 9_280
EMBEDDINGS = 64 * 32
NORM = 32
LLAMA = EMBEDDINGS + 3 * BLOCK + NORM
"""Of the tied model: 2,048 + 27,840 + 32 = 29,920."""
LORA_R4 = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
"""Of rank 4 on all linear layers of a block: 4·(128 + 96 + 288) = 2,048."""


def with_lora(model: Any) -> list[str]:
    """`0.q_proj` for each layer that carries LoRA."""
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return sorted(f"{name.split('.layers.')[1].split('.')[0]}.{name.rpartition('.')[2]}" for name in names)


@pytest.mark.parametrize(
    ("target_modules", "leaves"),
    [
        ("qv", ["q_proj", "v_proj"]),
        ("qkvo", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("all-linear", ALL_LINEAR),
        (["up_proj"], ["up_proj"]),
        (["mlp.up_proj", "o_proj"], ["up_proj", "o_proj"]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("layers", "indexes"),
    [("all", [0, 1, 2]), ("last-half", [1, 2]), ([2, 0, 2], [0, 2])],
    ids=str,
)
def test_lora_lies_on_the_named_layers_of_the_named_blocks_and_nowhere_else(
    make_model: Callable[..., Any], target_modules: Any, leaves: list[str], layers: Any, indexes: list[int]
) -> None:
    """`last-half` of three blocks is the upper two."""
    model = make_model("llama")
    config = lora_config(model, Lora(target_modules=target_modules, layers=layers), Unfreeze())
    expected = sorted(f"{index}.{leaf}" for index in indexes for leaf in leaves)
    assert with_lora(get_peft_model(model, config)) == expected


def test_last_half_of_an_even_number_of_blocks_is_half(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", num_hidden_layers=4)
    assert lora_config(model, Lora(layers="last-half"), Unfreeze()).layers_to_transform == [2, 3]


def test_settings_reach_peft_under_their_own_names(make_model: Callable[..., Any]) -> None:
    lora = Lora(
        r=3, lora_alpha=5, lora_dropout=0.25, bias="lora_only", use_rslora=True, use_dora=True, init_lora_weights=False
    )
    config = lora_config(make_model("llama"), lora, Unfreeze(), revision="abc")
    assert {key: getattr(config, key) for key in ("r", "lora_alpha", "lora_dropout", "bias", "revision")} == {
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.25,
        "bias": "lora_only",
        "revision": "abc",
    }
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, True, False)
    assert (config.task_type, config.modules_to_save) == ("CAUSAL_LM", None)


@pytest.mark.parametrize(
    ("entries", "mend"),
    [
        (["q_prj"], "did you mean `q_proj`? list some of down_proj"),
        (
            ["q_proj", "nonsense"],
            "list some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or use `all-linear`",
        ),
        (["lm_head"], "list some of"),
        (["proj"], "list some of"),
    ],
    ids=str,
)
def test_a_target_that_matches_no_layer_is_an_error_even_beside_one_that_does(
    make_model: Callable[..., Any], entries: list[str], mend: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        lora_config(make_model("llama"), Lora(target_modules=entries), Unfreeze())
    error = caught.value
    assert (error.code, error.pointer) == ("no-such-module", "/scope/lora/target_modules")
    assert f"`{entries[-1]}`" in error.message
    assert mend in error.mend


@pytest.mark.parametrize(
    ("kind", "fused", "layers"),
    [
        ("gpt2", "c_attn", ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]),
        ("phi3", "qkv_proj", ["model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.qkv_proj"]),
        (
            "gpt_neox",
            "query_key_value",
            ["gpt_neox.layers.0.attention.dense", "gpt_neox.layers.0.attention.query_key_value"],
        ),
    ],
)
def test_where_queries_keys_and_values_are_one_layer_qkvo_takes_it_and_qv_says_so(
    make_model: Callable[..., Any], kind: str, fused: str, layers: list[str]
) -> None:
    model = make_model(kind)
    with pytest.raises(PipelineError, match=f"are one layer of this model, `{fused}`") as caught:
        lora_config(model, Lora(target_modules="qv"), Unfreeze())
    assert f"list `[{fused}]`; or use `qkvo`" in caught.value.mend
    peft = get_peft_model(model, lora_config(model, Lora(target_modules="qkvo", layers=[0]), Unfreeze()))
    found = [name for name, module in peft.named_modules() if hasattr(module, "lora_A")]
    assert sorted(name.removeprefix("base_model.model.") for name in found) == layers


def test_layers_of_a_vision_tower_carry_no_lora_though_they_have_the_names() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**width, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**width, "image_size": 28, "patch_size": 14}
    for layers, blocks in (("all", "01"), ("last-half", "1")):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
        peft = get_peft_model(model, lora_config(model, Lora(layers=layers), Unfreeze()))
        found = {name for name, module in peft.named_modules() if hasattr(module, "lora_A")}
        tower = "base_model.model.model.language_model.layers"
        inside = ["self_attn." + name for name in ALL_LINEAR[:4]] + ["mlp." + name for name in ALL_LINEAR[4:]]
        assert found == {f"{tower}.{block}.{name}" for block in blocks for name in inside}


def test_opened_weights_alone_are_an_adapter_without_lora(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    peft = get_peft_model(model, lora_config(model, None, Unfreeze(last_blocks=3, lm_head=True)))
    assert with_lora(peft) == []
    account = trainable_of(peft)
    assert account.groups == {"opened": 3 * BLOCK + EMBEDDINGS}
    assert account.beyond_lora == {}


def test_what_no_linear_layer_holds_is_said(make_model: Callable[..., Any]) -> None:
    """The experts of a Mixtral block are two tensors of three dimensions."""
    model = make_model("mixtral")
    account = trainable_of(get_peft_model(model, lora_config(model, Lora(), Unfreeze(last_blocks=1))))
    assert account.beyond_lora == {
        "layers.*.mlp.experts.down_proj": 2,
        "layers.*.mlp.experts.gate_up_proj": 2,
    }
    assert account.as_dict()["beyond_lora"] == account.beyond_lora


def test_all_linear_on_gpt2_takes_its_conv1d_layers(make_model: Callable[..., Any]) -> None:
    config = lora_config(make_model("gpt2"), Lora(), Unfreeze())
    assert sorted(config.target_modules) == ["c_attn", "c_fc", "c_proj"]


def test_layers_that_the_model_has_not_are_an_error(make_model: Callable[..., Any]) -> None:
    with pytest.raises(PipelineError) as caught:
        lora_config(make_model("llama"), Lora(layers=[0, 3]), Unfreeze())
    error = caught.value
    assert (error.code, error.pointer) == ("out-of-range", "/scope/lora/layers")
    assert error.message == "the model has blocks 0 to 2, and `layers` names 3"


def test_opened_blocks_carry_no_lora_and_only_what_is_named_is_opened(make_model: Callable[..., Any]) -> None:
    """`modules_to_save: [norm]` would open the two norms of every block as well."""
    model = make_model("llama", tie_word_embeddings=True)
    config = lora_config(model, Lora(), Unfreeze(last_blocks=1, final_norm=True, lm_head=True))
    peft = get_peft_model(model, config)
    assert with_lora(peft) == sorted(f"{index}.{leaf}" for index in (0, 1) for leaf in ALL_LINEAR)
    opened = [name for name, module in peft.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert opened == [
        "base_model.model.model.layers.2",
        "base_model.model.model.norm",
        "base_model.model.lm_head",
    ]
    trainable = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {name for name in trainable if is_opened(name)}
    assert sum(is_opened(name) for name in trainable) == 9 + 1 + 1  # the block's nine tensors, the norm's, the head's


@pytest.mark.parametrize(
    ("lora", "unfreeze"),
    [(Lora(), Unfreeze(last_blocks=3)), (Lora(layers=[1, 2]), Unfreeze(last_blocks=2))],
    ids=["all", "list"],
)
def test_a_lora_of_which_every_block_is_opened_is_an_error(
    make_model: Callable[..., Any], lora: Lora, unfreeze: Unfreeze
) -> None:
    with pytest.raises(PipelineError) as caught:
        lora_config(make_model("llama"), lora, unfreeze)
    assert (caught.value.code, caught.value.pointer) == ("conflict", "/scope/lora/layers")


@pytest.mark.parametrize(
    ("kind", "unfreeze", "expected"),
    [
        ("llama", Unfreeze(), []),
        ("llama", Unfreeze(last_blocks=2), ["model.layers.1", "model.layers.2"]),
        ("llama", Unfreeze(last_blocks=3), ["model.layers.0", "model.layers.1", "model.layers.2"]),
        (
            "gpt2",
            Unfreeze(last_blocks=1, final_norm=True, lm_head=True),
            ["transformer.h.2", "transformer.ln_f", "lm_head"],
        ),
        ("gpt_neox", Unfreeze(final_norm=True), ["gpt_neox.final_layer_norm"]),
    ],
)
def test_opened_modules_are_full_names(
    make_model: Callable[..., Any], kind: str, unfreeze: Unfreeze, expected: list[str]
) -> None:
    assert opened_modules(anatomy_of(make_model(kind)), unfreeze) == expected


def test_more_blocks_than_there_are_cannot_be_opened() -> None:
    with pytest.raises(PipelineError) as caught:
        opened_modules(Anatomy(("a.0", "a.1"), "norm", "head", head_is_tied=False), Unfreeze(last_blocks=3))
    error = caught.value
    assert (error.code, error.pointer) == ("out-of-range", "/scope/unfreeze/last_blocks")
    assert error.mend == "open at most 2"


@pytest.mark.parametrize(("key", "said"), [("final_norm", "no final norm"), ("lm_head", "no lm head")])
def test_what_the_model_has_not_cannot_be_opened(key: str, said: str) -> None:
    with pytest.raises(PipelineError, match=said) as caught:
        opened_modules(Anatomy(("a.0",), None, None, head_is_tied=False), Unfreeze(**{key: True}))
    assert (caught.value.code, caught.value.pointer) == ("no-such-module", f"/scope/unfreeze/{key}")


def test_the_error_points_at_the_stage_that_opens() -> None:
    with pytest.raises(PipelineError) as caught:
        opened_modules(Anatomy(("a.0",), None, None, head_is_tied=False), Unfreeze(last_blocks=2), "/dpo/unfreeze")
    assert caught.value.pointer == "/dpo/unfreeze/last_blocks"


def test_opened_weights_are_held_in_float32_beside_a_bfloat16_base(make_model: Callable[..., Any]) -> None:
    """And the copies that PEFT makes of them: those are what trains."""
    model = make_model("llama", tie_word_embeddings=False).to(torch.bfloat16)
    config = lora_config(model, Lora(), Unfreeze(last_blocks=1, lm_head=True))
    hold_in_float32(model, config.modules_to_save)
    assert {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32} == {
        name for name, _ in model.named_parameters() if name.startswith(("model.layers.2.", "lm_head."))
    }
    trainable = [parameter for parameter in get_peft_model(model, config).parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}


def packed(weights: int) -> nn.Parameter:
    """As bitsandbytes keeps that many 4-bit weights: two in a byte."""
    parameter = nn.Parameter(torch.zeros(weights // 2, 1, dtype=torch.uint8), requires_grad=False)
    parameter.quant_storage = torch.uint8
    return parameter


def test_the_account_of_an_adapter(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    trainable = trainable_of(get_peft_model(model, lora_config(model, Lora(r=4), Unfreeze())))
    assert trainable.parameters == 3 * LORA_R4 == 6_144
    assert trainable.all_parameters == LLAMA + 3 * LORA_R4 == 36_064
    assert trainable.groups == {"adapter": 6_144}
    assert trainable.modules == {
        **{f"lora layers.*.mlp.{leaf}": 3 for leaf in ("down_proj", "gate_proj", "up_proj")},
        **{f"lora layers.*.self_attn.{leaf}": 3 for leaf in ("k_proj", "o_proj", "q_proj", "v_proj")},
    }
    assert not trainable.unties_head
    assert trainable.as_dict() == {
        "trainable_parameters": 6_144,
        "all_parameters": 36_064,
        "trainable_percent": 17.0364,  # 6144/36064 = 0.17036380
        "groups": trainable.groups,
        "modules": trainable.modules,
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_account_of_opened_weights_counts_them_once_and_the_reference_not_at_all(
    make_model: Callable[..., Any], tied: bool
) -> None:
    """Opened: a block, the norm, the head: 9,280 + 32 + 2,048. LoRA is left on two blocks.

    The original under an opened module is in no saved model; a tied head that is opened is one matrix more.
    """
    model = make_model("llama", tie_word_embeddings=tied)
    unfreeze = Unfreeze(last_blocks=1, final_norm=True, lm_head=True)
    peft = get_peft_model(model, lora_config(model, Lora(r=4), unfreeze))
    alone = trainable_of(peft)
    assert alone.groups == {"adapter": 2 * LORA_R4, "opened": BLOCK + NORM + 2_048}
    assert alone.parameters == 4_096 + 11_360
    assert alone.all_parameters == LLAMA + 2_048 + 4_096
    assert {name: count for name, count in alone.modules.items() if name.startswith("opened")} == {
        "opened layers.*": 1,
        "opened lm_head": 1,
        "opened norm": 1,
    }
    assert alone.modules["lora layers.*.self_attn.q_proj"] == 2
    assert alone.unties_head is tied
    peft.add_adapter("ref", peft.peft_config["default"])
    assert trainable_of(peft) == alone


def test_four_bit_weights_are_counted_as_weights_and_not_as_bytes(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    config = lora_config(model, Lora(r=4, target_modules="qv"), Unfreeze())
    model.model.layers[0].mlp.up_proj.weight = packed(64 * 32)
    assert trainable_of(get_peft_model(model, config)).all_parameters == LLAMA + 3 * 4 * (64 + 48)


def test_nothing_trainable_is_an_error(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    peft = get_peft_model(model, lora_config(model, Lora(), Unfreeze()))
    peft.requires_grad_(False)
    with pytest.raises(PipelineError, match="0 %") as caught:
        trainable_of(peft)
    assert (caught.value.code, caught.value.pointer) == ("nothing-trainable", "/scope")


def test_everything_trainable_beside_an_adapter_is_an_error(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    peft = get_peft_model(model, lora_config(model, Lora(), Unfreeze()))
    peft.requires_grad_(True)
    with pytest.raises(PipelineError, match="100 %") as caught:
        trainable_of(peft)
    assert caught.value.code == "everything-trainable"


def test_is_opened_knows_peft_names() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "q": nn.Linear(4, 4)})
    peft = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=["norm"]))
    assert [name for name, _ in peft.named_parameters() if is_opened(name)] == [
        "base_model.model.norm.modules_to_save.default.weight",
        "base_model.model.norm.modules_to_save.default.bias",
    ]
