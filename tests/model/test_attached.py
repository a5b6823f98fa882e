"""`pipeline.model.adapter.attached`: an adapter on a base for a while, and the base afterwards as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model.adapter import attached

Make = Callable[..., Any]
Write = Callable[..., tuple[Path, torch.Tensor]]
Logits = Callable[[Any], torch.Tensor]

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*")


def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that an adapter may touch: identities, values, flags, attributes."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "attributes": {name: id(value) for name, value in vars(model).items()},
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
    }


def assert_as_before(model: Any, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values, expected = after.pop("values"), before["values"]
    assert after == {key: value for key, value in before.items() if key != "values"}
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "lora"),
    [
        ({}, {}),
        ({}, {"use_dora": True, "use_rslora": True}),
        (TIED, {"modules_to_save": ["model.layers.2", "model.norm", "lm_head"], "layers_to_transform": [0, 1]}),
        (UNTIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"attention_bias": True}, {"bias": "all"}),
        ({}, {"init_lora_weights": "pissa"}),
        ({}, {"init_lora_weights": "olora"}),
    ],
    ids=["lora", "dora", "opened", "embeddings", "bias", "pissa", "olora"],
)
def test_the_base_is_as_it_was_after_an_adapter_was_attached(
    make_model: Make, write_adapter: Write, logits_of: Logits, changes: dict[str, Any], lora: dict[str, Any]
) -> None:
    """Some parameters of this base train and one of its modules is in training mode: that stays so as well."""
    folder, expected = write_adapter(make_model("llama", **changes), **lora)
    base = make_model("llama", **changes)
    base.requires_grad_(False)
    base.model.layers[1].requires_grad_(True)
    base.model.layers[1].mlp.train()
    before, plain = snapshot(base), logits_of(base)
    with attached(base, folder) as model:
        assert torch.allclose(logits_of(model), expected, atol=1e-4)
        assert not model.training
    assert_as_before(base, before)
    assert torch.equal(logits_of(base), plain)


def test_adapters_attached_in_turn_see_the_base_alone(
    make_model: Make, write_adapter: Write, logits_of: Logits
) -> None:
    """The first one opens the head and trains biases; nothing of that is in the second, nor in the first again."""
    changes = {"attention_bias": True, **TIED}
    first, of_first = write_adapter(
        make_model("llama", **changes), "first", modules_to_save=["lm_head", "model.norm"], bias="all"
    )
    second, of_second = write_adapter(make_model("llama", **changes), "second", use_dora=True)
    base = make_model("llama", **changes)
    before = snapshot(base)
    for folder, expected in ((first, of_first), (second, of_second), (first, of_first)):
        with attached(base, folder) as model:
            assert torch.equal(logits_of(model), expected)
        assert_as_before(base, before)


def test_the_base_is_as_it_was_when_the_work_inside_fails(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model("llama", **TIED), modules_to_save=["lm_head"])
    base = make_model("llama", **TIED)
    before = snapshot(base)
    with pytest.raises(KeyboardInterrupt), attached(base, folder):
        raise KeyboardInterrupt
    assert_as_before(base, before)
