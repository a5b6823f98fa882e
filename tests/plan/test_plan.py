from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.plan import memory as memory_module
from pipeline.plan.plan import Plan, plan
from pipeline.plan.table import print_plan
from pipeline.runs.run import create_run

CONTRACT = {
    "trainable_parameters",
    "all_parameters",
    "trainable_percent",
    "groups",
    "modules",
    "steps",
    "memory_bytes",
}
PARTS = ["weights", "adapter_and_opened", "gradients", "optimizer", "reference", "logits", "activations"]


@pytest.fixture
def planned(write_experiment: Callable[..., Path], tmp_path: Path, console: Console) -> Callable[..., Plan]:
    def make(stage: Any = None, **changes: Any) -> Plan:
        one = load_experiment(write_experiment(**changes)).experiment
        return plan(one, tmp_path / "runs", console, stage=stage)

    return make


def test_the_json_has_one_stage_at_the_top_and_both_below(planned: Callable[..., Plan]) -> None:
    answer = json.loads(json.dumps(planned("dpo").as_dict(), allow_nan=False))
    assert set(answer["stages"]) == {"sft", "dpo"}
    for one in (answer, *answer["stages"].values()):
        assert set(one) >= CONTRACT
        assert list(one["memory"]) == PARTS
        assert one["memory_bytes"] == sum(one["memory"].values())
    assert answer["stage"] == "dpo"
    assert {key: answer[key] for key in answer["stages"]["dpo"]} == answer["stages"]["dpo"]
    # 12 rows in batches of 4: 3 steps an epoch, 4 epochs of SFT and 2 of DPO.
    assert [answer["stages"][stage]["steps"] for stage in ("sft", "dpo")] == [12, 6]
    assert answer["tokens"] == 2 * answer["data"]["tokens"]["tokens"]
    assert answer["disk"]["total"] == answer["disk"]["adapter"] + 2 * answer["disk"]["checkpoint"]
    assert answer["learning_rates"] == {"adapter": 5.0e-3}


def test_the_stage_is_sft_unless_there_are_preferences_only(
    planned: Callable[..., Plan], tiny_data: dict[str, Path]
) -> None:
    assert planned().stage == "sft"
    only = {"demonstrations": None, "preferences": {"train": str(tiny_data["preferences"])}}
    made = planned(data=only, sft={"eval_strategy": "no"}, dpo={"eval_strategy": "no"})
    assert (made.stage, list(made.stages)) == ("dpo", ["dpo"])
    asked = planned("sft", data=only, sft={"eval_strategy": "no"}, dpo={"eval_strategy": "no"})
    assert list(asked.stages) == ["sft", "dpo"]
    assert asked.stages["sft"].steps.total is None


def test_the_time_is_that_of_an_earlier_run_or_none(
    planned: Callable[..., Plan], tmp_path: Path, console: Console
) -> None:
    made = planned()
    assert made.as_dict()["time"] == {"seconds": None, "tokens_per_second": None, "measured_in": None}
    print_plan(made, console)
    assert "no finished run on this device to go by" in console.file.getvalue()
    one = made.stages["sft"]
    assert one.tokens is not None
    manifest = {
        "base": {"id": made.base, "revision": None, "quantize": "none"},
        "device": made.device,
        "metrics": {"num_tokens": 500.0, "train_runtime": 5.0},
    }
    create_run(tmp_path / "runs", "lights", "sft", "name: lights\n", manifest).end("finished")
    answer = planned().as_dict()["time"]
    assert answer == {"seconds": one.tokens / 100, "tokens_per_second": 100.0, "measured_in": "lights/sft-001"}


def test_without_data_the_printed_plan_says_what_is_not_known(planned: Callable[..., Plan], console: Console) -> None:
    made = planned(
        data={"demonstrations": None, "preferences": None}, sft={"eval_strategy": "no"}, dpo={"eval_strategy": "no"}
    )
    print_plan(made, console)
    text = console.file.getvalue()
    for line in ("rows: not known, the experiment names no file to train on", "steps: not known without the rows"):
        assert line in text
    assert "max_length stands in for them" in text
    answer = made.as_dict()
    assert (answer["steps"], answer["tokens"]) == (None, None)
    assert answer["memory_bytes"] > 0
    assert answer["largest_batch"] == {"sequences": 4, "length": 128, "positions": 4 * 128, "tokens": 4 * 128}


def test_the_printed_plan_has_the_line_of_peft_and_every_part_of_the_memory(
    planned: Callable[..., Plan], console: Console
) -> None:
    made = planned(dpo={"unfreeze": {"last_blocks": 1, "learning_rate": 1e-6}})
    print_plan(made, console)
    text = console.file.getvalue()
    for stage in made.stages.values():
        one = stage.trainable
        assert (
            f"trainable params: {one.parameters:,} || all params: {one.all_parameters:,} || "
            f"trainable%: {one.percent:.4f}"
        ) in text.splitlines()
    for words in ("opened layers.*", "learning rate 1e-06", "AdamW's moments", "steps: 12 (3 an epoch, 4.00 epochs)"):
        assert words in text
    assert text.count("the reference's own copies") == 1


def test_checkpointing_and_a_smaller_batch_take_less(planned: Callable[..., Plan]) -> None:
    whole, spared, halved = (
        planned(sft=changes).as_dict()
        for changes in ({}, {"gradient_checkpointing": True}, {"per_device_train_batch_size": 2})
    )
    activations = [one["memory"]["activations"] for one in (whole, spared, halved)]
    assert activations[1] < 0.7 * activations[0]
    tokens = [one["largest_batch"]["tokens"] for one in (whole, halved)]
    assert tokens[1] < 0.7 * tokens[0]
    assert activations[2] == pytest.approx(activations[0] * tokens[1] / tokens[0], rel=0.1)
    assert spared["memory"]["weights"] == halved["memory"]["weights"] == whole["memory"]["weights"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_padding_is_counted_where_the_engine_keeps_it(
    planned: Callable[..., Plan], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that the engine cannot take apart; and a model that fails on its form, which TRL's way still counts."""
    ours = planned().stages[stage]  # type: ignore[index]
    assert ours.memory.without_padding
    assert ours.computed.tokens < ours.batch.sequences * ours.batch.length
    monkeypatch.setattr(memory_module, "_pads", lambda *_, **__: "it cannot")
    theirs = planned().stages[stage]  # type: ignore[index]
    assert not theirs.memory.without_padding
    assert theirs.computed.tokens == theirs.batch.sequences * theirs.batch.length
    assert (theirs.memory.total or 0) > 1.05 * (ours.memory.total or 0)
    monkeypatch.undo()
    trace = memory_module.trace_step

    def fails_on_our_form(policy: Any, batch: Any, **how: Any) -> Any:
        if batch.rows:
            raise TypeError("unexpected keyword")
        return trace(policy, batch, **how)

    monkeypatch.setattr(memory_module, "trace_step", fails_on_our_form)
    assert planned().stages[stage].memory == theirs.memory  # type: ignore[index]


def test_a_model_whose_layers_hand_a_state_on_is_counted_as_trl_trains_it(
    planned: Callable[..., Plan], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"], "vocab_size": len(tiny_tokenizer)}
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads, **linear, **layers)).save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer.save_pretrained(tmp_path / "hybrid")
    made = planned(model={"id": str(tmp_path / "hybrid"), "device": "cpu"})
    assert [stage.memory.without_padding for stage in made.stages.values()] == [False, False]
    assert made.as_dict()["padding"] is True


def test_options_are_checked_first(planned: Callable[..., Plan]) -> None:
    with pytest.raises(PipelineError, match="no field of TRL's SFTConfig"):
        planned(sft={"options": {"no_such_field": 1}})


@pytest.mark.builtin_model
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_built_in_model_trains_in_the_planned_memory(stage: str, tmp_path: Path) -> None:
    """Stated tolerance, over three steps on the longest rows, libraries included: 0.8 to 1.3 of what the plan says.

    Measured: SFT 1.21, DPO 1.12. The process of a plan has not loaded all that training does, and the allocator keeps
    memory that was freed.
    """
    recipe = Path(__file__).parents[2] / "recipes/partial.yaml"
    changes = ["sft.per_device_train_batch_size=4", "dpo.per_device_train_batch_size=2", "dpo.unfreeze.last_blocks=2"]
    sets = [word for change in changes for word in ("--set", change)]

    def run(*command: str) -> dict[str, Any]:
        where = ["--checkpoints", str(tmp_path), "--format", "json"]
        words = [sys.executable, "-m", "pipeline", *command, str(recipe), *sets, *where]
        return dict(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))

    made = run("plan")
    if stage == "dpo":
        run("sft", "--set", "sft.max_steps=1", "--set", "sft.eval_strategy=no")
    peak = run(stage, "--dry-run")["peak_memory_bytes"]
    total = made["stages"][stage]["memory_bytes"]
    assert made["process_bytes"] is not None
    assert 0.8 < peak / (total + made["process_bytes"]) < 1.3
