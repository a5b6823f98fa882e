"""Linear layers that do in one pass what PEFT does in several: values and gradients are PEFT's."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.training.engine import linear, prepacked
from pipeline.training.engine.half import Half
from pipeline.training.engine.linear import added_up, join_products
from tests.tiny import LLAMA, config_of, save_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 67).view(2, 32)


def build(folder: Path, **settings: Any) -> Any:
    """A LoRA model whose adapter does something."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ALL, **settings}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def result(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one batch; dropout draws the same numbers each time."""
    model.zero_grad()
    torch.manual_seed(1)
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return output.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the joined product computes."""
    counts: list[int] = []
    stock = linear._lora

    def counted(x: Any, dropped: Any, below: Any, *loras: Any) -> Any:
        counts.append(len(below.weights))
        return stock(x, dropped, below, *loras)

    monkeypatch.setattr(linear, "_lora", counted)
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_rslora": True, "lora_alpha": 8},
        {"rank_pattern": {"k_proj": 2, "up_proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"layers_to_transform": [2, 3]},
        {"modules_to_save": ["model.layers.3", "model.norm", "lm_head"], "layers_to_transform": [0, 1, 2]},
    ],
    ids=lambda settings: ",".join(settings) or "all-linear",
)
def test_values_and_gradients_are_those_of_peft(
    tiny_folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follows_peft(build(tiny_folder, **settings), monkeypatch) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_dropout": 0.3},
        {"target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["model.layers.3", "model.norm"], "layers_to_transform": [0, 1, 2]},
    ],
    ids=lambda settings: ",".join(settings) or "all-linear",
)
def test_rounding_touches_gradients_alone_and_little(tiny_folder: Path, settings: dict[str, Any]) -> None:
    model = build(tiny_folder, **settings)
    logits, gradients = result(copy.deepcopy(model))
    join_products(model, rounds=True)
    for _ in range(2):  # rounded weights made, and used again
        ours, found = result(model)
        assert torch.allclose(ours, logits, atol=1e-5)
        assert found.keys() == gradients.keys()
        apart = {name: float((found[name] - grad).norm() / grad.norm()) for name, grad in gradients.items()}
        assert max(apart.values()) < 0.03
    assert max(apart.values()) > 1e-4  # it does round


def test_without_room_for_copies_the_result_is_the_same(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_folder)
    other = copy.deepcopy(model)
    join_products(model, rounds=True)
    monkeypatch.setattr(prepacked, "available_memory", lambda device: 1000)
    join_products(other, rounds=True)
    for one, two in zip(result(model)[1].values(), result(other)[1].values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("packs", [False, True])
def test_a_rounded_weight_is_made_anew_when_the_weight_has_changed(
    packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs:
        monkeypatch.setattr("pipeline.training.engine.half.packs", lambda weight: False)
    weights = [torch.nn.Parameter(torch.full((out, 2), 1.0), requires_grad=False) for out in (2, 3)]
    half = Half(weights, kept=True)
    into = torch.ones(4, 5, dtype=torch.bfloat16)
    assert torch.equal(half.through(into), torch.full((4, 2), 5.0))
    made = half._last
    half.through(into)
    assert half._last is made
    weights[1].fill_(2.0)
    assert torch.equal(half.through(into), torch.full((4, 2), 8.0))


def test_a_rounded_weight_that_trains_is_not_kept() -> None:
    half = Half([torch.nn.Parameter(torch.ones(2, 3))], kept=True)
    assert torch.equal(half.through(torch.ones(4, 2, dtype=torch.bfloat16)), torch.full((4, 3), 2.0))
    assert half._last is None


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_one_plain_lora_is_left_to_peft(
    tiny_folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follows_peft(build(tiny_folder, **settings), monkeypatch) == 0


@pytest.mark.parametrize(("biased", "joined"), [(False, 4 * 7), (True, 4 * 3)])
def test_a_layer_whose_bias_trains_is_left_to_peft(
    biased: bool, joined: int, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bias: all` trains the biases of four attention layers in each of four blocks, where the model has them."""
    config = config_of("Llama", tiny_tokenizer, **LLAMA, attention_bias=biased)
    model = build(save_model(tmp_path, config, tiny_tokenizer), bias="all")
    assert follows_peft(model, monkeypatch) == joined


def follows_peft(model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Asserts PEFT's values and gradients; returns how many layers computed them here."""
    logits, gradients = result(copy.deepcopy(model))
    join_products(model, rounds=False)
    counts = count_layers(monkeypatch)
    ours, found = result(model)
    assert torch.allclose(ours, logits, atol=1e-4)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name
    return sum(counts)


@pytest.mark.parametrize(
    ("settings", "of_a_block"),
    [
        ({}, [3, 1, 2, 1]),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, [2, 1]),
        ({"lora_dropout": 0.3}, [1] * 7),
    ],
)
def test_layers_that_read_the_same_are_one_call(
    tiny_folder: Path, settings: dict[str, Any], of_a_block: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_folder, **settings)
    join_products(model, rounds=True)
    counts = count_layers(monkeypatch)
    result(model)
    assert counts == 4 * of_a_block


class Apart(torch.nn.Module):
    """Two layers that are named as if they read the same, and do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 8)
        self.k_proj = torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k_proj(self.q_proj(x))


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Apart()])

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers[0](x)


@pytest.mark.parametrize("rounds", [False, True])
def test_layers_that_do_not_read_the_same_are_seen_to(rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Blocks(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    stock = copy.deepcopy(model)
    monkeypatch.setattr(linear, "anatomy_of", lambda base: SimpleNamespace(blocks=["layers.0"]))
    join_products(model, rounds=rounds)
    counts = count_layers(monkeypatch)
    for _ in range(3):
        x = torch.randn(5, 8)
        for each in (model, stock):
            each.zero_grad()
            each(x).square().sum().backward()
        assert torch.allclose(model(x), stock(x), atol=1e-6)
        for one, other in zip(model.parameters(), stock.parameters(), strict=True):
            if other.grad is not None:
                assert one.grad is not None
                assert float((one.grad - other.grad).norm() / other.grad.norm()) < (0.03 if rounds else 1e-5)
    assert counts[0] == 2
    assert set(counts[1:]) == {1}


@pytest.mark.parametrize(("rounds", "kept"), [(False, torch.float32), (True, torch.bfloat16)])
def test_what_is_kept_of_the_input_is_as_exact_as_the_gradient(
    rounds: bool, kept: torch.dtype, tiny_folder: Path
) -> None:
    model = build(tiny_folder)
    join_products(model, rounds=rounds)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        layer(torch.randn(5, layer.in_features))
    assert [tensor.dtype for tensor in saved if tensor.shape == (5, layer.in_features)] == [kept]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_waits_for_longer_than_a_forward(
    fails: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output that waits holds all activations below it, which a step that ran out of memory has to give back."""
    model = build(tiny_folder)
    join_products(model, rounds=False)
    counts = count_layers(monkeypatch)
    mlp = model.get_base_model().model.layers[0].mlp
    siblings = mlp.gate_proj.forward.func.__self__
    x = torch.randn(2, 32)

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate: torch.Tensor = mlp.gate_proj(x)
        assert siblings._waiting
        if fails:
            raise torch.OutOfMemoryError
        return gate

    with monkeypatch.context() as patched:
        patched.setattr(mlp, "forward", forward)
        with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
            mlp(x)
    assert not siblings._waiting
    assert siblings._read is None
    mlp(x)
    assert counts == ([2, 2, 1] if fails else [2, 1, 1, 1])  # nobody came for the other, so it is not made again


def test_what_one_layer_computed_is_not_another_s_for_another_x(tiny_folder: Path) -> None:
    """The same tensor with other numbers, and the same numbers where gradients are asked for, are computed anew."""
    model = build(tiny_folder)
    stock = copy.deepcopy(model)
    join_products(model, rounds=False)
    ours, theirs = (each.get_base_model().model.layers[0].self_attn for each in (model, stock))
    x = torch.randn(1, 4, 32)
    ours.q_proj(x)
    x.mul_(2)
    assert torch.allclose(ours.k_proj(x), theirs.k_proj(x), atol=1e-5)
    ours, theirs = (each.get_base_model().model.layers[1].self_attn for each in (model, stock))
    with torch.no_grad():
        ours.q_proj(x)
    assert ours.k_proj(x).requires_grad


def test_disabled_switched_and_merged_adapters_are_peft_s(tiny_folder: Path) -> None:
    model = build(tiny_folder)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    stock = copy.deepcopy(model)
    join_products(model, rounds=True)

    def both() -> None:
        with torch.no_grad():
            assert torch.allclose(model(input_ids=IDS).logits, stock(input_ids=IDS).logits, atol=1e-5)

    for each in (model, stock):
        each.set_adapter("other")
    both()
    with model.disable_adapter(), stock.disable_adapter():
        both()
    for each in (model, stock):
        each.set_adapter("default")
        each.merge_adapter()
    both()


def test_autocast_and_half_precision_are_left_to_peft(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_lora", None)
    model = build(tiny_folder)
    join_products(model, rounds=True)
    with torch.autocast("cpu", torch.bfloat16):
        result(model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16), LoraConfig(target_modules="all-linear")
    )
    join_products(model, rounds=True)
    result(model)


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 32}, {"use_dora": True}, {"r": 16}])
def test_the_sum_of_the_weights_answers_as_peft(tiny_folder: Path, settings: dict[str, Any], joins: bool) -> None:
    model = build(tiny_folder, **settings).eval()
    stock = copy.deepcopy(model)
    if joins:
        join_products(model, rounds=True)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    forwards = [module.forward for module in model.modules()]
    with torch.no_grad():
        expected = stock(input_ids=IDS).logits
        with added_up(model):
            ours = model(input_ids=IDS).logits
            with model.disable_adapter(), stock.disable_adapter():
                assert torch.allclose(model(input_ids=IDS).logits, stock(input_ids=IDS).logits, atol=1e-4)
        assert torch.allclose(ours, expected, atol=1e-4)
    assert [module.forward for module in model.modules()] == forwards
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_the_sum_is_what_is_multiplied_with(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_folder).eval()
    with added_up(model), torch.no_grad():
        monkeypatch.setattr(torch.nn.Linear, "forward", None)  # A's and B's, and the layer's below
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        assert layer(torch.randn(3, 32)).shape == (3, layer.out_features)


def test_gradients_and_dropout_never_see_the_sum(tiny_folder: Path) -> None:
    model = build(tiny_folder, lora_dropout=0.3)
    logits, gradients = result(copy.deepcopy(model))
    with added_up(model):
        ours, found = result(model)
        torch.manual_seed(1)
        with torch.no_grad():
            drawn = model(input_ids=IDS).logits
    assert torch.equal(ours, logits)
    assert torch.equal(drawn, logits)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_another_adapter_never_sees_the_sum(tiny_folder: Path) -> None:
    model = build(tiny_folder).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=ALL, init_lora_weights=False))
    with torch.no_grad():
        model.set_adapter("other")
        expected = model(input_ids=IDS).logits
        model.set_adapter("default")
        with added_up(model):
            model.set_adapter("other")
            assert torch.equal(model(input_ids=IDS).logits, expected)


def test_without_room_for_sums_nothing_changes(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_folder)
    forwards = [module.forward for module in model.modules()]
    monkeypatch.setattr(prepacked, "available_memory", lambda device: 1000)
    with added_up(model):
        assert [module.forward for module in model.modules()] == forwards
