"""The joint forward against TRL's own trainer: loss, metrics and gradients, on each family and for each loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from pipeline.experiment import LossType
from pipeline.training.engine.head import compact_head
from pipeline.training.engine.joint import join
from pipeline.training.engine.shared_prompt import SharedPrompt

SMALL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},  # shorter than every prompt but one
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 2.0,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}
PAIRS = [
    {"prompt_ids": list(range(10, 24)), "chosen_ids": [30, 31, 32, 0], "rejected_ids": [40, 41, 0]},
    # Completions that begin alike, and one that begins the other.
    {"prompt_ids": list(range(50, 59)), "chosen_ids": [60, 61, 62, 63, 0], "rejected_ids": [60, 61, 70, 0]},
    {"prompt_ids": [80, 81, 82], "chosen_ids": [90, 91], "rejected_ids": [90, 91, 92, 93, 0]},
    # One token each.
    {"prompt_ids": list(range(100, 112)), "chosen_ids": [5], "rejected_ids": [6]},
    # No prompt, and nothing in common.
    {"prompt_ids": [], "chosen_ids": [7, 8, 9], "rejected_ids": [17, 18, 19, 20]},
    # Cut by the length of 24, inside the completions.
    {"prompt_ids": list(range(120, 141)), "chosen_ids": list(range(150, 170)), "rejected_ids": list(range(180, 199))},
]

FRONT = list(range(200, 210))
FRONTED = [
    {"prompt_ids": [*FRONT, 10, 11, 12], "chosen_ids": [30, 31, 32, 0], "rejected_ids": [40, 41, 0]},
    # Nothing behind it: both branches begin with its next token.
    {"prompt_ids": [*FRONT, 50], "chosen_ids": [60, 61, 0], "rejected_ids": [62, 0]},
    # A part of it is in the completions, which begin alike.
    {"prompt_ids": FRONT[:6], "chosen_ids": [*FRONT[6:], 70, 71, 0], "rejected_ids": [*FRONT[6:], 70, 72, 73, 0]},
]


def build(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.fixture
def make_trainer(tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """TRL's trainer with a reference of its own, its head on the positions in the loss."""

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    def make(family: str = "llama", **options: Any) -> Any:
        config = DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
            max_length=24, **options,
        )  # fmt: skip
        return Trainer(
            model=build(family, 1),
            ref_model=build(family, 2),
            args=config,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tiny_tokenizer,
        )

    return make


def measured(trainer: Any, pairs: list[dict[str, list[int]]]) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Loss, metrics and gradients of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    inputs = trainer._prepare_inputs(trainer.data_collator(pairs))
    with compact_head(torch.device("cpu")):
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    named = trainer.model.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    return float(loss.detach()), metrics, gradients


def hold_equal(trainer: Any, pairs: list[dict[str, list[int]]]) -> None:
    """The plain path first, then the joint one on policy and reference."""
    loss, metrics, gradients = measured(trainer, pairs)
    both = [SharedPrompt(trainer.model), SharedPrompt(trainer.ref_model)]
    for shared in both:
        assert shared.refusal() is None
        shared.install()
    joint_loss, joint_metrics, joint_gradients = measured(trainer, pairs)
    assert all(shared.layers == 2 for shared in both)
    for shared in both:
        shared.uninstall()
    assert joint_loss == pytest.approx(loss, abs=2e-5, rel=1e-6)
    assert joint_metrics == pytest.approx(metrics, abs=1e-4)
    assert set(joint_gradients) == set(gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(joint_gradients[name], gradient, atol=1e-4, rtol=1e-3), name
    assert any(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_alike(make_trainer: Callable[..., Any], family: str) -> None:
    trainer = make_trainer(family)
    assert trainer.aux_loss_enabled == (family == "mixtral")
    hold_equal(trainer, PAIRS)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_pairs_begin_with_trains_alike(make_trainer: Callable[..., Any], family: str) -> None:
    trainer = make_trainer(family)
    inputs = trainer.data_collator(FRONTED)
    joint = join(inputs["input_ids"], inputs["attention_mask"])
    assert joint.front == len(FRONT)
    apart = join(inputs["input_ids"], inputs["attention_mask"], apart=True)
    assert apart.front == 0
    assert apart.input_ids.numel() - joint.input_ids.numel() == (len(FRONTED) - 1) * len(FRONT)
    hold_equal(trainer, FRONTED)


def test_a_front_is_for_several_pairs_and_some_tokens(make_trainer: Callable[..., Any]) -> None:
    collate = make_trainer().data_collator
    for pairs in (FRONTED[:1], PAIRS, [PAIRS[0], {**PAIRS[0], "prompt_ids": [*range(10, 17), 1]}]):
        batch = collate(pairs)
        assert join(batch["input_ids"], batch["attention_mask"]).front == 0


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_each_left_over_case_trains_alike(make_trainer: Callable[..., Any], pair: int) -> None:
    hold_equal(make_trainer(), [PAIRS[pair]])


def test_every_loss_and_option_trains_alike(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(label_smoothing=0.1, loss_type=["sigmoid"])
    for loss in get_args(LossType):
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
        hold_equal(trainer, PAIRS)
    trainer.loss_types = ["sigmoid"]
    for ld_alpha, divergence in ((0.5, "reverse_kl"), (None, "js_divergence"), (None, "forward_kl")):
        trainer.ld_alpha, trainer.f_divergence_type = ld_alpha, divergence
        hold_equal(trainer, PAIRS)


def test_weighting_trains_alike(make_trainer: Callable[..., Any]) -> None:
    hold_equal(make_trainer(use_weighting=True), PAIRS)


def test_gradient_checkpointing_trains_alike(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("mistral")
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    hold_equal(trainer, PAIRS)


def test_the_check_passes_what_is_equal_and_refuses_what_is_not(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.training.engine import attention

    trainer = make_trainer("mistral")
    shared = SharedPrompt(trainer.model)
    shared.install()
    batch = trainer.data_collator(PAIRS)
    with compact_head(torch.device("cpu")):
        assert shared.check(trainer.model, batch) is None
        stock = attention.attend

        def without_window(*args: Any, **kwargs: Any) -> Any:
            return stock(*args[:4], None, **kwargs)

        monkeypatch.setattr(attention, "attend", without_window)
        assert "nats a token off" in str(shared.check(trainer.model, batch))


def test_states_along_the_row_and_other_attention_are_refused() -> None:
    model = build("qwen3", 0)
    shared = SharedPrompt(model)
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert "linear_attention" in str(shared.refusal())
    model.config.layer_types = ["full_attention"] * 2
    model.set_attn_implementation("eager")
    assert "`eager`" in str(shared.refusal())


def test_generation_is_left_alone(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    ids = torch.tensor([[10, 11, 12, 13]])
    trainer.model.eval()
    plain = trainer.model.generate(ids, max_new_tokens=8, do_sample=False)
    shared = SharedPrompt(trainer.model)
    shared.install()
    assert torch.equal(trainer.model.generate(ids, max_new_tokens=8, do_sample=False), plain)
    shared.uninstall()
    assert {module.config._attn_implementation for module in trainer.model.modules() if hasattr(module, "config")} == {
        "sdpa"
    }
