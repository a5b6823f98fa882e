"""Frozen blocks computed once, against TRL's own path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from pipeline.experiment_file import load_experiment
from pipeline.training.dpo import run_dpo
from pipeline.training.engine.head import compact_head
from pipeline.training.engine.shared_prompt import SharedPrompt
from pipeline.training.engine.trunk import Trunk, frozen_blocks
from pipeline.training.sft import run_sft
from tests.training.engine.test_shared_prompt import PAIRS, build

ROWS = PAIRS[:5]


def opened(family: str) -> Any:
    """Two blocks, the last of which trains, and TRL's head."""
    model = build(family, 1).requires_grad_(False)
    frozen = frozen_blocks(model.requires_grad_(True))
    assert frozen == []
    model.requires_grad_(False)
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    blocks[-1].requires_grad_(True)
    disable_dropout_in_model(model)
    add_fused_lm_head(model)
    return model.train()


def scored(model: Any, rows: list[dict[str, list[int]]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradients of their squares."""
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    model.zero_grad()
    with compact_head(torch.device("cpu")):
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
        )
        output.log_probs.square().sum().backward()
    named = model.named_parameters()
    return output.log_probs.detach(), {name: part.grad.clone() for name, part in named if part.grad is not None}


def with_trunk(model: Any, tokens: int, where: str, folder: Path) -> tuple[SharedPrompt, Trunk]:
    shared = SharedPrompt(model)
    shared.install()
    blocks = frozen_blocks(model)
    assert len(blocks) == 1
    behind = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[1]
    shared.trunk = Trunk(blocks, behind, tokens, where, folder)  # type: ignore[arg-type]
    return shared, shared.trunk


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_values_and_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = opened(family)
    logps, gradients = scored(model, ROWS)
    _, trunk = with_trunk(model, 1000, "memory", tmp_path)
    for _ in range(2):  # once to fill it, once out of it
        again, others = scored(model, ROWS)
        assert torch.allclose(again, logps, atol=1e-4)
        assert set(others) == set(gradients)
        for name, gradient in gradients.items():
            assert torch.allclose(others[name], gradient, atol=1e-3, rtol=1e-3), name
    assert trunk.passes == len(ROWS)


def test_rows_are_found_in_another_order_and_batch(tmp_path: Path) -> None:
    model = opened("llama")
    expected, _ = scored(model, [ROWS[3], ROWS[0]])
    _, trunk = with_trunk(model, 1000, "memory", tmp_path)
    scored(model, ROWS)
    found, _ = scored(model, [ROWS[3], ROWS[0]])
    assert torch.allclose(found, expected, atol=1e-4)
    assert trunk.passes == len(ROWS)


def test_beyond_the_bound_rows_go_through_the_trunk_each_time(tmp_path: Path) -> None:
    """The first pair takes 13 shared tokens, 4 and 3 more; the second has 10 shared, 3 and 2 more."""
    model = opened("llama")
    expected, _ = scored(model, ROWS[:2])
    _, trunk = with_trunk(model, 20, "memory", tmp_path)
    for _ in range(2):
        found, _ = scored(model, ROWS[:2])
        assert torch.allclose(found, expected, atol=1e-4)
    assert trunk.passes == 3
    assert trunk.size == 20 * 16 * 4


def test_a_file_holds_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = opened("llama")
    expected, _ = scored(model, ROWS)
    _, trunk = with_trunk(model, 1000, "disk", tmp_path)
    for _ in range(2):
        found, _ = scored(model, ROWS)
        assert torch.allclose(found, expected, atol=1e-4)
    assert trunk.passes == len(ROWS)
    assert list(tmp_path.iterdir()) == []


def test_the_trunk_ends_below_the_first_weight_that_trains() -> None:
    model = build("llama", 0).requires_grad_(False)
    assert len(frozen_blocks(model)) == 1  # nothing trains: all but one, for the forward pass to begin in
    model.model.norm.weight.requires_grad_(True)
    assert len(frozen_blocks(model)) == 1
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert frozen_blocks(model) == [model.model.layers[0]]
    model.model.embed_tokens.weight.requires_grad_(True)
    assert frozen_blocks(model) == []
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    assert frozen_blocks(model) == []


def test_the_check_sees_a_trunk_that_is_wrong() -> None:
    model = opened("llama")
    shared, trunk = with_trunk(model, 1000, "memory", Path())
    batch = DataCollatorForPreference(pad_token_id=0)(ROWS)
    with compact_head(torch.device("cpu")):
        assert shared.check(model, batch) is None
        assert shared.check(model, batch) is None
        assert trunk._kept is not None
        trunk._kept.mul_(1.5)
        assert "nats a token off" in str(shared.check(model, batch))


def exactly(trunk_cache: str) -> dict[str, str]:
    """Rounded gradients would tell the order of sums apart, which differs: kept rows share no front."""
    return {"trunk_cache": trunk_cache, "precision": "exact"}


def test_a_run_with_the_trunk_kept_is_the_run_without(
    write_experiment: Callable[..., Path], tmp_path: Path, console: Any
) -> None:
    """Four blocks, LoRA on the upper two: the lower two are frozen."""
    root = tmp_path / "checkpoints"
    scope = {"lora": {"r": 4, "layers": "last-half"}}
    run_sft(load_experiment(write_experiment(scope=scope, sft={"max_steps": 2})).experiment, root, console)
    metrics, accounts = {}, {}
    for setting in ("off", "auto", "disk"):
        path = write_experiment(scope=scope, dpo={"max_steps": 4}, engine=exactly(setting))
        outcome = run_dpo(load_experiment(path).experiment, root, console)
        metrics[setting] = outcome.metrics
        accounts[setting] = json.loads((outcome.run / "run.json").read_text())["engine"]["trunk"]
    assert accounts["off"] is None
    assert (accounts["auto"]["blocks"], accounts["auto"]["where"], accounts["disk"]["where"]) == (2, "memory", "disk")
    assert "2 frozen blocks are computed once a row" in console.file.getvalue()
    for setting in ("auto", "disk"):
        for name in ("loss", "rewards/margins", "logps/rejected", "grad_norm", "eval_loss"):
            assert metrics[setting][name] == pytest.approx(metrics["off"][name], abs=1e-4, rel=2e-6), name


def test_opened_blocks_share_prompts_and_the_trunk_below_them(
    write_experiment: Callable[..., Path], tmp_path: Path, console: Any
) -> None:
    """PEFT's copies of opened blocks read the joint row as well: policy and reference, with the trunk and without."""
    root = tmp_path / "checkpoints"
    run_sft(load_experiment(write_experiment(sft={"max_steps": 2})).experiment, root, console)
    opened = {"last_blocks": 1, "final_norm": True, "learning_rate": 1.0e-3}
    metrics, engines = {}, {}
    for setting in ("off", "auto"):
        path = write_experiment(dpo={"max_steps": 4, "adapter": "frozen", "unfreeze": opened}, engine=exactly(setting))
        outcome = run_dpo(load_experiment(path).experiment, root, console)
        metrics[setting] = outcome.metrics
        engines[setting] = json.loads((outcome.run / "run.json").read_text())["engine"]
        assert engines[setting]["shared_prompt"], engines[setting]["refusal"]
    assert (engines["off"]["trunk"], engines["auto"]["trunk"]["blocks"]) == (None, 3)
    for name in ("loss", "rewards/margins", "logps/rejected", "grad_norm", "eval_loss"):
        assert metrics["auto"][name] == pytest.approx(metrics["off"][name], abs=1e-4, rel=2e-6), name
