"""Every scope on every architecture, through `run_dpo` itself: what trains, at which rate, and what is saved.

Tolerances, on log-probabilities and logits of float32 models of width 16: the reference drifts by exactly 0; the
saved adapter reopened by stock PEFT gives the trained logits to 1e-4 (what was folded or fixed is rounded in another
order); merged, saved and loaded without PEFT, to 1e-3. The reference's log-probabilities of whole answers, which the
trainer computes in joint rows and packed, are those of stock PEFT to 1e-3.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import hashes_of
from pipeline.runs.resume import Resume
from pipeline.runs.run import Run, read_run
from pipeline.training import dpo as dpo_module
from pipeline.training.dpo import run_dpo
from pipeline.training.engine.reference import row_digest
from pipeline.training.keeper import Keeper
from pipeline.training.proof import Scores, reference_hash

REOPENED, MERGED, REFERENCE = 1e-4, 1e-3, 1e-3
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
    "opened-by-sft": {"dpo": {}},
}
STARTS = {"last-half": "sft-last-half", "opened-by-sft": "sft-opened"}
"""Which of the SFT adapters a scope starts from; else `sft-all`."""
OPENED_BY_SFT = [("llama", True), ("gemma3", True), ("gpt2", False), ("mixtral", False)]
CELLS = [
    (name, tied, scope)
    for name in KINDS
    for tied in (True, False)
    for scope in SCOPES
    if scope != "opened-by-sft" or (name, tied) in OPENED_BY_SFT
]


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
        upper, lower = list(range(DEPTH // 2, DEPTH)), list(range(DEPTH // 2))
        opened = [*(f"{kind.blocks}.{index}" for index in upper), kind.norm, "lm_head"]
        for layers, own in (
            ("all", {}),
            ("last-half", {"layers_to_transform": upper}),
            ("opened", {"layers_to_transform": lower, "modules_to_save": opened}),
        ):
            sft = get_peft_model(
                AutoModelForCausalLM.from_pretrained(folder),
                LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=kind.linear.split("|"), **own),
            )
            with torch.no_grad():
                for parameter_name, parameter in sft.named_parameters():
                    if "lora_B" in parameter_name or ".modules_to_save." in parameter_name:
                        parameter.add_(0.05 * torch.randn_like(parameter))  # B is zero
            sft.save_pretrained(folder / f"sft-{layers}", save_embedding_layers=False)
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
        "opened-by-sft": lambda name: not name.startswith(tuple(upper)),
    }[scope]
    linear = re.compile(rf"{re.escape(kind.blocks)}\.\d+\..*\b({kind.linear})\.weight")
    adapter = {
        f"{name.removesuffix('.weight')}.lora_{matrix}.default.weight"
        for name in names
        if linear.fullmatch(name) and with_lora(name)
        for matrix in "AB"
    }
    opened = set()
    if scope in ("lora+opened", "opened-only"):
        for module in [*(prefix.rstrip(".") for prefix in upper), kind.norm, "lm_head"]:
            inner = [name.removeprefix(f"{module}.") for name in names if name.startswith(f"{module}.")]
            opened |= {f"{module}.modules_to_save.default.{name}" for name in inner or ["weight"]}  # a tied head
    return {"adapter": adapter, "opened": opened}


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize(
    ("name", "tied", "scope"), CELLS, ids=lambda value: {True: "tied", False: "untied"}.get(value, value)
)
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
    start = folder / STARTS.get(scope, "sft-all")
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


CELLS_RESUMED = [
    ("llama", True, "lora"),
    ("llama", False, "lora+opened"),
    ("gpt2", True, "lora+opened"),
    ("qwen3_5", True, "opened-only"),
]


@dataclass
class Stopped:
    """A DPO run that was stopped behind its first checkpoint, to be resumed as often as a test likes."""

    experiment: Any
    start: Path
    """The SFT adapter."""
    base: Path
    root: Path
    console: Any

    def copy(self, root: Path) -> Run:
        shutil.copytree(self.root, root)
        return read_run(root / "lights/dpo-001")

    def resume(self, run: Run) -> Run:
        run_dpo(self.experiment, run.path.parents[1], self.console, resume=Resume())
        return read_run(run.path)

    def logps(self, adapter: Path, rows: Iterable[dict[str, list[int]]]) -> torch.Tensor:
        """Of chosen and rejected under an adapter that stock PEFT opens, `[N, 2]` nats, one sequence at a time."""
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), adapter).eval()
        return torch.tensor([[logp_of(model, row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES] for row in rows])


SIDES = ("chosen", "rejected")


@pytest.fixture
def stopped(
    folders: Callable[[str, bool], Path],
    write_experiment: Callable[..., Path],
    tmp_path: Path,
    console: Any,
    tiny_data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, bool, str], Stopped]:
    def make(name: str, tied: bool, scope: str) -> Stopped:
        folder, given = folders(name, tied), SCOPES[scope]
        rhythm = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "warmup_steps": 0}
        path = write_experiment(
            model={"id": str(folder), "device": "cpu"},
            data={"demonstrations": None, "preferences": {"train": str(tiny_data["preferences"])}},
            scope={"lora": {"r": 2, "lora_alpha": 4, **given.get("lora", {})}},
            dpo={**rhythm, "lr_scheduler_type": "constant", "learning_rate": 2.0e-2, **given["dpo"]},
        )
        experiment, start, root = load_experiment(path).experiment, folder / "sft-all", tmp_path / "stopped"
        training_step = dpo_module._Trainer.training_step

        def stopping(self: Any, *rest: Any, **more: Any) -> Any:
            if self.state.global_step == 1:
                raise KeyboardInterrupt
            return training_step(self, *rest, **more)

        with monkeypatch.context() as patched:
            patched.setattr(dpo_module._Trainer, "training_step", stopping)
            with pytest.raises(PipelineError, match="with a checkpoint of step 1"):
                run_dpo(experiment, root, console, start=str(start))
        return Stopped(experiment, start, folder, root, console)

    return make


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize(("name", "tied", "scope"), CELLS_RESUMED)
def test_a_resumed_run_keeps_the_sft_adapter_as_its_reference(
    name: str,
    tied: bool,
    scope: str,
    stopped: Callable[[str, bool, str], Stopped],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hash, log-probabilities in memory and those that were kept, drift; the policy of the checkpoint is another."""
    one = stopped(name, tied, scope)
    run = one.copy(tmp_path / "resumed")
    checkpoint, then = one.root / "lights/dpo-001/state/checkpoint-1", run.manifest["reference"]
    scores: list[Scores] = []
    trainers: list[Any] = []
    score, train = dpo_module.score, dpo_module.train

    def watched_train(trainer: Any, *rest: Any, **more: Any) -> Any:
        trainers.append(trainer)
        return train(trainer, *rest, **more)

    def watched_score(*given: Any) -> Scores:
        scores.append(score(*given))
        return scores[-1]

    monkeypatch.setattr(dpo_module, "train", watched_train)
    monkeypatch.setattr(dpo_module, "score", watched_score)
    run = one.resume(run)

    reference = run.manifest["reference"]
    parts = run.manifest["base"]["sha256"], run.manifest["tokenizer"]["template_sha256"]
    assert run.manifest["resumed"][0]["step"] == 1
    assert reference["hash"] == then["hash"] == reference_hash(parts[0], hashes_of(one.start), parts[1])
    assert reference["adapter_sha256"] == hashes_of(one.start)["sha256"] != hashes_of(checkpoint)["sha256"]
    assert reference["drift"] == 0.0

    rows = list(trainers[0].train_dataset)
    expected = one.logps(one.start, rows)
    assert (one.logps(checkpoint, rows) - expected).abs().max() > 100 * REFERENCE
    before, after = (some.reference for some in scores)
    assert (before - expected[: len(before)]).abs().max() <= REFERENCE
    assert torch.equal(after, before)
    kept = trainers[0]._kept._new | trainers[0]._kept._before  # what rewards and loss were made of, by row
    scored = [(torch.tensor(kept[row_digest(row)]), at) for at, row in enumerate(rows) if row_digest(row) in kept]
    assert len(scored) >= 8  # two steps of four pairs
    assert all((logps - expected[at]).abs().max() <= REFERENCE for logps, at in scored)
    # Rewards begin where the stopped run left them, which the checkpoint's policy as reference would set to 0.
    assert abs(run.manifest["metrics"]["rewards/margins"]) > 0.01


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Input and output embeddings are no longer tied")
def test_a_reference_from_the_checkpoint_is_caught(
    stopped: Callable[[str, bool, str], Stopped], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Trainer itself does on resuming: the trainer is built from the checkpoint, and `ref` is copied from it.

    Or `ref` is the SFT adapter at first, and overwritten when the policy's weights are put back.
    """
    one = stopped("llama", False, "lora+opened")
    built, overwritten = one.copy(tmp_path / "built"), one.copy(tmp_path / "overwritten")
    open_policy, load_policy = dpo_module.open_policy, Keeper.load_policy

    with monkeypatch.context() as patched:
        checkpoint = built.path / "state/checkpoint-1"
        patched.setattr(
            dpo_module, "open_policy", lambda base, folder, *rest, **more: open_policy(base, checkpoint, *rest, **more)
        )
        with pytest.raises(PipelineError, match="the reference in the trainer is not the SFT adapter") as caught:
            one.resume(built)
        assert caught.value.code == "wrong-start"

    def load_both(self: Any, folder: Path) -> None:
        load_policy(self, folder)
        set_peft_model_state_dict(
            self._trainer.model, load_file(folder / "adapter_model.safetensors"), adapter_name="ref"
        )

    monkeypatch.setattr(Keeper, "load_policy", load_both)
    with pytest.raises(PipelineError, match="reference moved") as caught:
        one.resume(overwritten)
    assert caught.value.code == "reference-moved"
    assert [read_run(run.path).status for run in (built, overwritten)] == ["failed", "failed"]


def logp_of(model: Any, prompt: list[int], completion: list[int]) -> float:
    """Of one completion, in nats: the sum over its tokens."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    at = torch.arange(len(prompt), len(prompt) + len(completion))
    return float(logps[at - 1, ids[0, at]].sum())


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
