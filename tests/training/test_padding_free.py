"""Batches without padding against TRL's padded ones: the same values and the same gradients, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AttentionInterface
from trl import SFTConfig, SFTTrainer

from pipeline.training.engine.head import compact_head
from pipeline.training.engine.padding_free import SEGMENTS, attend_by_row, leave_padding_out
from pipeline.training.engine.parts import Part, Row

LENGTHS = (9, 23, 3, 14)
WINDOW = 5
SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-half-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "mistral-sliding": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2-softcaps": ("Gemma2", {"sliding_window": WINDOW, "attn_implementation": "eager"}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2-eager": (
        "GPT2",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_implementation": "eager"},
    ),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "llama-checkpointed": ("Llama", {"checkpointed": True}),
}


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    given = {"attn_implementation": "sdpa", **SMALL, **changes}
    checkpointed = given.pop("checkpointed", False)
    if family == "GPT2":
        given = {
            name: value
            for name, value in given.items()
            if name in ("vocab_size", "initializer_range") or name not in SMALL
        }
        given |= {
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        }
    heads = {"Gemma3": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    configs = {"Gemma3": "Gemma3TextConfig"}
    config = getattr(transformers, configs.get(family, f"{family}Config"))(**given)
    model = getattr(transformers, heads.get(family, f"{family}ForCausalLM"))(config)
    model.checkpointed = checkpointed
    return model


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Rows of mixed length; the labels of the second have a gap, those of the third are its last token alone."""
    generator = torch.Generator().manual_seed(4)
    some = []
    for at, length in enumerate(LENGTHS):
        ids = torch.randint(2, 97, (length,), generator=generator).tolist()
        labels = list(ids)
        labels[: length // 2] = [-100] * (length // 2)
        if at == 1:
            labels[15:18] = [-100] * 3
        if at == 2:
            labels = [-100, -100, ids[2]]
        some.append({"input_ids": ids, "labels": labels})
    return some


@pytest.fixture
def make_trainer(tiny_tokenizer: Any, rows: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(model: Any, **options: Any) -> Any:
        config = SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=len(rows),
            gradient_checkpointing=getattr(model, "checkpointed", False),
            bf16=False,
            disable_tqdm=True,
            **options,
        )
        if getattr(model, "checkpointed", False):
            model.gradient_checkpointing_enable()
        data = Dataset.from_list(rows)
        return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tiny_tokenizer)

    return make


def step(trainer: Any, rows: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, list[float]]]:
    """Loss, gradients and metrics of one micro-batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.current_gradient_accumulation_steps = 1
    with compact_head(torch.device("cpu")):
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(20))
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_padded_batch(name: str, make_trainer: Any, rows: Any) -> None:
    family, changes = MODELS[name]
    trainer = make_trainer(build(family, **changes))
    loss, gradients, metrics = step(trainer, rows)
    assert leave_padding_out(trainer) is None
    assert trainer.data_collator(rows)["input_ids"].shape == (1, sum(LENGTHS))
    without, others, figures = step(trainer, rows)
    assert without == pytest.approx(loss, abs=2e-5)
    assert gradients.keys() == others.keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        assert torch.allclose(gradient, others[parameter], atol=2e-5 * scale, rtol=1e-3), parameter
    metrics.pop("num_tokens"), figures.pop("num_tokens")  # a running total
    for key, values in metrics.items():
        assert figures[key] == pytest.approx(values, abs=1e-4), key


FRONT = list(range(40, 50))


def fronted(rows: Any) -> list[dict[str, list[int]]]:
    """The rows behind one beginning, which is in the loss of the first two; of the last there is one token more."""
    trained = [FRONT, FRONT, [-100] * len(FRONT), [-100] * len(FRONT)]
    some = [
        {"input_ids": [*FRONT, *row["input_ids"]], "labels": [*labels, *row["labels"]]}
        for row, labels in zip(rows, trained, strict=True)
    ]
    some[3] = {name: values[: len(FRONT) + 1] for name, values in some[3].items()}
    return [*some[:3], {**some[3], "labels": [-100] * len(FRONT) + some[3]["input_ids"][-1:]}]


def computed_tokens(trainer: Any) -> list[int]:
    """How many tokens the first norm of the model sees in each forward pass."""
    seen: list[int] = []
    norm = next(module for name, module in trainer.model.named_modules() if name.endswith(("input_layernorm", "ln_1")))
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_what_all_rows_begin_with_is_computed_once(name: str, make_trainer: Any, rows: Any) -> None:
    family, changes = MODELS[name]
    trainer = make_trainer(build(family, **changes))
    some = fronted(rows)
    loss, gradients, metrics = step(trainer, some)
    assert leave_padding_out(trainer) is None
    seen = computed_tokens(trainer)
    without, others, figures = step(trainer, some)
    whole = sum(len(row["input_ids"]) for row in some)
    assert set(seen) == {whole - 3 * len(FRONT)}
    assert without == pytest.approx(loss, abs=2e-5)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        assert torch.allclose(gradient, others[parameter], atol=2e-5 * scale, rtol=1e-3), parameter
    metrics.pop("num_tokens"), figures.pop("num_tokens")
    for key, values in metrics.items():
        assert figures[key] == pytest.approx(values, abs=1e-4), key


def test_dropout_is_drawn_for_each_row(make_trainer: Any, rows: Any) -> None:
    """Shared, the beginning would be dropped alike in every row, as in no batch of TRL's; evaluation drops nothing."""
    model = build("Llama")
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    trainer = make_trainer(model)
    assert leave_padding_out(trainer) is None
    seen = computed_tokens(trainer)
    some = fronted(rows)
    whole = sum(len(row["input_ids"]) for row in some)
    step(trainer, some)
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(**trainer._prepare_inputs(trainer.data_collator(some)), fused_lm_head=True)
    assert seen == [whole, whole - 3 * len(FRONT)]


def test_no_row_sees_another(make_trainer: Any, rows: Any) -> None:
    """Other tokens in the other rows leave a row's log-probabilities as they are, to the bit."""
    trainer = make_trainer(build("Mistral", sliding_window=WINDOW))
    assert leave_padding_out(trainer) is None

    def logps_of_second(some: Any) -> torch.Tensor:
        with torch.no_grad():
            output = trainer.model(**trainer.data_collator(some), fused_lm_head=True)
        return output.log_probs[0, LENGTHS[0] : LENGTHS[0] + LENGTHS[1] - 1]

    changed = [
        row if at == 1 else {**row, "input_ids": [96 - token for token in row["input_ids"]]}
        for at, row in enumerate(rows)
    ]
    assert torch.equal(logps_of_second(rows), logps_of_second(changed))


def test_other_batches_keep_the_models_own_attention(make_trainer: Any, rows: Any) -> None:
    model = build("Llama")
    trainer = make_trainer(model)
    ids = torch.tensor([rows[1]["input_ids"]])
    before = model(input_ids=ids).logits
    assert leave_padding_out(trainer) is None
    step(trainer, rows)
    assert model.config._attn_implementation == "pipeline_rows"
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("own", "answers"), [("sdpa", "short_rows"), ("eager", "eager")])
def test_answers_are_short_rows(make_trainer: Any, rows: Any, own: str, answers: str) -> None:
    model = build("Llama")
    model.set_attn_implementation(own)
    trainer = make_trainer(model)
    ids = torch.tensor([rows[1]["input_ids"]])
    before = model(input_ids=ids).logits
    assert leave_padding_out(trainer) is None
    step(trainer, rows)
    model.load_state_dict(build("Llama").state_dict())
    assert torch.allclose(model(input_ids=ids, use_cache=True).logits, before, atol=1e-5)
    assert model.config._attn_implementation == answers


def hybrid() -> Any:
    linear = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    return build("Qwen3Next", **EXPERTS, **linear)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (hybrid, {}, "hand a state from token to token (linear_attention)"),
        (lambda: build("Llama"), {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        (lambda: build("Llama"), {"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
    ],
)
def test_what_needs_padding_keeps_it(model: Any, options: Any, reason: str, make_trainer: Any, rows: Any) -> None:
    trainer = make_trainer(model(), **options)
    said = leave_padding_out(trainer)
    assert reason in str(said)
    assert not trainer.data_collator.padding_free
    step(trainer, rows)


def test_a_model_that_reads_otherwise_keeps_padding(
    make_trainer: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention that lets rows see each other is caught by the trial, and the padded path is as it was."""

    def one_row(module: Any, query: Any, *rest: Any, row_parts: Row, **kwargs: Any) -> Any:
        return attend_by_row(module, query, *rest, row_parts=Row([Part(0, query.shape[2])]), **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, SEGMENTS, one_row)
    trainer = make_trainer(build("Llama"))
    loss = step(trainer, rows)[0]
    said = leave_padding_out(trainer)
    assert "apart from the padded one" in str(said)
    assert step(trainer, rows)[0] == loss
    assert trainer.model.config._attn_implementation == "sdpa"
