"""Every scope on every architecture, through `run_dpo` itself: what trains, at which rate, and what is saved.

Tolerances, on log-probabilities and logits of float32 models of width 16: the reference drifts by exactly 0; the
saved adapter reopened by stock PEFT gives the trained logits to 1e-4 (what was folded or fixed is rounded in another
order); merged, saved and loaded without PEFT, to 1e-3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.experiment_file import load_experiment
from pipeline.runs.run import read_run
from pipeline.training import dpo as dpo_module
from pipeline.training.dpo import run_dpo

REOPENED, MERGED = 1e-4, 1e-3
RATES = {"adapter": 5.0e-3, "opened": 1.0e-3}
DEPTH = 4


@dataclass(frozen=True)
class Kind:
    """An architecture, with the names of its parts written down by hand."""

    config: str
    settings: dict[str, Any]
    blocks: str = "model.layers"
    norm: str = "model.norm"
    linear: str = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    """Leaf names of the linear layers of a block."""


_WIDTH = {"hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
_LLAMA = {**_WIDTH, "intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8}
_HYBRID = {
    **_LLAMA,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
KINDS = {
    "llama": Kind("LlamaConfig", _LLAMA),
    "qwen2": Kind("Qwen2Config", {**_WIDTH, "intermediate_size": 16, "num_key_value_heads": 1}),
    "qwen3": Kind("Qwen3Config", _LLAMA),
    "qwen3_5": Kind(
        "Qwen3_5TextConfig",
        _HYBRID,
        linear="q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|"
        "out_proj",
    ),
    "mistral": Kind("MistralConfig", {**_LLAMA, "sliding_window": 16}),
    "gemma3": Kind("Gemma3TextConfig", {**_LLAMA, "sliding_window": 16}),
    "phi3": Kind(
        "Phi3Config",
        {**_WIDTH, "intermediate_size": 16, "num_key_value_heads": 1},
        linear="qkv_proj|o_proj|gate_up_proj|down_proj",
    ),
    "gpt2": Kind(
        "GPT2Config",
        {"n_embd": 16, "n_layer": DEPTH, "n_head": 2, "n_positions": 128},
        blocks="transformer.h",
        norm="transformer.ln_f",
        linear="c_attn|c_proj|c_fc",
    ),
    "gpt_neox": Kind(
        "GPTNeoXConfig",
        {**_WIDTH, "intermediate_size": 16},
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        linear="query_key_value|dense|dense_h_to_4h|dense_4h_to_h",
    ),
    # The experts of each block are two tensors of three dimensions, and the router is no linear layer either.
    "mixtral": Kind("MixtralConfig", {**_LLAMA, "num_local_experts": 2}, linear="q_proj|k_proj|v_proj|o_proj"),
}
OPENED = {"last_blocks": 2, "final_norm": True, "lm_head": True, "learning_rate": RATES["opened"]}
SCOPES: dict[str, dict[str, Any]] = {
    "lora": {"dpo": {}},
    "last-half": {"lora": {"layers": "last-half"}, "dpo": {}},
    "lora+opened": {"dpo": {"unfreeze": OPENED}},
    "opened-only": {"dpo": {"unfreeze": OPENED, "adapter": "frozen"}},
}


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """The base of an architecture, with a random SFT adapter under `sft` for each place that LoRA can lie in."""
    made: dict[tuple[str, bool], Path] = {}

    def make(name: str, tied: bool) -> Path:
        if (name, tied) in made:
            return made[name, tied]
        kind, folder = KINDS[name], tmp_path_factory.mktemp(f"{name}-{'tied' if tied else 'untied'}")
        tokens = {"vocab_size": len(tiny_tokenizer), "bos_token_id": None}
        tokens |= {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
        config = getattr(transformers, kind.config)(
            **{**tokens, "initializer_range": 0.2, "tie_word_embeddings": tied, **kind.settings}
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        for layers in ("all", "last-half"):
            own = {} if layers == "all" else {"layers_to_transform": list(range(DEPTH // 2, DEPTH))}
            sft = get_peft_model(
                AutoModelForCausalLM.from_pretrained(folder),
                LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=kind.linear.split("|"), **own),
            )
            with torch.no_grad():
                for parameter_name, parameter in sft.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.copy_(0.05 * torch.randn_like(parameter))
            sft.save_pretrained(folder / f"sft-{layers}")
        made[name, tied] = folder
        return folder

    return make


def expected_of(kind: Kind, scope: str, names: list[str]) -> dict[str, set[str]]:
    """The parameters that train by group, from the names of the base's parameters and the rule of each scope."""
    upper = [f"{kind.blocks}.{index}." for index in range(DEPTH // 2, DEPTH)]
    with_lora = {
        "lora": lambda name: True,
        "last-half": lambda name: name.startswith(tuple(upper)),
        "lora+opened": lambda name: not name.startswith(tuple(upper)),
        "opened-only": lambda name: False,
    }[scope]
    linear = re.compile(rf"{re.escape(kind.blocks)}\.\d+\..*\b({kind.linear})\.weight")
    adapter = {
        f"{name.removesuffix('.weight')}.lora_{matrix}.default.weight"
        for name in names
        if linear.fullmatch(name) and with_lora(name)
        for matrix in "AB"
    }
    opened = set()
    if "opened" in scope:
        for module in [*(prefix.rstrip(".") for prefix in upper), kind.norm, "lm_head"]:
            inner = [name.removeprefix(f"{module}.") for name in names if name.startswith(f"{module}.")]
            opened |= {f"{module}.modules_to_save.default.{name}" for name in inner or ["weight"]}  # a tied head
    return {"adapter": adapter, "opened": opened}


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", KINDS)
def test_cell(
    name: str,
    tied: bool,
    scope: str,
    folders: Callable[[str, bool], Path],
    write_experiment: Callable[..., Path],
    tmp_path: Path,
    console: Any,
    tiny_data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, folder, given = KINDS[name], folders(name, tied), SCOPES[scope]
    start = folder / ("sft-last-half" if scope == "last-half" else "sft-all")
    rhythm = {"max_steps": 2, "weight_decay": 0.1, "save_strategy": "no", "eval_strategy": "no", "warmup_steps": 0}
    path = write_experiment(
        model={"id": str(folder), "device": "cpu"},
        data={"demonstrations": None, "preferences": {"train": str(tiny_data["preferences"])}},
        scope={"lora": {"r": 2, "lora_alpha": 4, **given.get("lora", {})}},
        dpo={**rhythm, "lr_scheduler_type": "constant", "learning_rate": RATES["adapter"], **given["dpo"]},
    )
    seen: dict[str, Any] = {}
    train, save = dpo_module.train, dpo_module.save_adapter

    def watched_train(trainer: Any, *rest: Any, **more: Any) -> Any:
        seen["trainer"], metrics = trainer, train(trainer, *rest, **more)
        return metrics

    def watched_save(policy: Any, *rest: Any) -> None:
        seen["logits"] = logits_of(policy.eval())
        save(policy, *rest)

    monkeypatch.setattr(dpo_module, "train", watched_train)
    monkeypatch.setattr(dpo_module, "save_adapter", watched_save)
    outcome = run_dpo(load_experiment(path).experiment, tmp_path / "runs", console, start=str(start))

    run = read_run(outcome.run)
    assert run.manifest["reference"]["drift"] == 0.0
    expected = expected_of(kind, scope, names_of(folder))
    assert_groups(seen["trainer"], expected)
    assert set(outcome.trainable.groups) == {group for group, names in expected.items() if names}
    assert bool(outcome.trainable.beyond_lora) == (name in ("mixtral", "qwen3_5") and scope != "opened-only")

    sft_logits = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), start).eval())
    assert (seen["logits"] - sft_logits).abs().max() > 10 * MERGED
    reopened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.adapter).eval()
    assert (logits_of(reopened) - seen["logits"]).abs().max() <= REOPENED
    merged = reopened.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits_of(loaded) - seen["logits"]).abs().max() <= MERGED
    assert loaded.config.tie_word_embeddings is (tied and "opened" not in scope)


def names_of(folder: Path) -> list[str]:
    """The parameters of the base; a tied head is none of them."""
    return [name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits.float()


def assert_groups(trainer: Any, expected: dict[str, set[str]]) -> None:
    """Each trainable parameter stands in one group, at its rate, and norms and biases decay in none."""
    names = {
        id(parameter): name.removeprefix("base_model.model.") for name, parameter in trainer.model.named_parameters()
    }
    found: dict[str, set[str]] = {"adapter": set(), "opened": set()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            which = "opened" if ".modules_to_save." in name else "adapter"
            assert name not in found[which]
            found[which].add(name)
            assert group["lr"] == group["initial_lr"] == RATES[which], name
            decays = re.search(r"norm|\bln_|bias$", name) is None
            assert group["weight_decay"] == (0.1 if decays else 0.0), name
    assert found == expected
