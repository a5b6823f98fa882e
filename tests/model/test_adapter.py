from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file

from pipeline.errors import PipelineError
from pipeline.experiment import Unfreeze
from pipeline.model.adapter import adapter_sha256, attached, require_adapter, save_adapter
from pipeline.model.policy import open_policy

Make = Callable[..., Any]
Write = Callable[..., tuple[Path, torch.Tensor]]
Logits = Callable[[Any], torch.Tensor]

NOTHING = Unfreeze()
NORM = Unfreeze(final_norm=True)
BLOCK = Unfreeze(last_blocks=1)
HEAD = Unfreeze(lm_head=True)
ALL = Unfreeze(last_blocks=1, final_norm=True, lm_head=True)

pytestmark = pytest.mark.filterwarnings(
    "error:You are trying to modify a model with PEFT for a second time",
    "error:Already found a `peft_config` attribute",
    "ignore:.*ensure_weight_tying.*",
    "ignore:fan_in_fan_out is set to False",
    "ignore:The following alpha_pattern keys did not match",  # a pattern for a block that is folded and opened
)

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GPT2_LORA = {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"]}


@pytest.mark.parametrize(
    ("unfreeze", "opened"),
    [
        (NOTHING, []),
        (NORM, ["norm"]),
        (BLOCK, ["layers.2"]),
        (HEAD, ["lm_head"]),
        (ALL, ["layers.2", "norm", "lm_head"]),
    ],
    ids=["nothing", "norm", "block", "head", "all"],
)
@pytest.mark.parametrize(
    ("kind", "changes", "lora"),
    [
        ("llama", TIED, {}),
        ("llama", UNTIED, {}),
        ("llama", TIED, {"use_dora": True}),
        ("llama", TIED, {"use_rslora": True}),
        ("llama", TIED, {"layers_to_transform": [1, 2]}),
        ("llama", TIED, {"target_modules": r".*\.(q_proj|down_proj)"}),
        ("llama", TIED, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.2\..*": 32}}),
        ("qwen2", TIED, {}),
        ("gemma3_text", TIED, {}),
        ("gpt2", TIED, GPT2_LORA),
    ],
    ids=["tied", "untied", "dora", "rslora", "upper", "pattern", "ranks", "qwen2", "gemma3", "gpt2"],
)
def test_the_policy_starts_as_the_sft_model(
    make_model: Make,
    write_adapter: Write,
    logits_of: Logits,
    kind: str,
    changes: dict[str, Any],
    lora: dict[str, Any],
    unfreeze: Unfreeze,
    opened: list[str],
) -> None:
    base = make_model(kind, **changes)
    plain = logits_of(base)
    folder, expected = write_adapter(make_model(kind, **changes), **lora)
    assert (plain - expected).abs().max() > 0.1
    policy = open_policy(base, folder, unfreeze).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(".default." in name and ("lora_" in name or ".modules_to_save." in name) for name in trained)
    wrapped = [name for name, module in policy.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert [name.split(".modules_to_save")[0].rpartition(".model.")[2] for name in wrapped] == [
        {"layers.2": "transformer.h.2", "norm": "transformer.ln_f"}.get(name, name) if kind == "gpt2" else name
        for name in opened
    ]
    with_lora = [name for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    assert any(".1." in name for name in with_lora)
    assert not any("modules_to_save" in name or "original_module" in name for name in with_lora)


def test_an_opened_block_is_the_base_plus_the_scaled_product_and_lora_below_is_the_sft_adapters(
    make_model: Make, write_adapter: Write
) -> None:
    """W + alpha/r·B·A with alpha 8 and r 4, so 2·B·A; the untouched layers of the block are W."""
    folder, _ = write_adapter(make_model())
    saved = load_file(folder / "adapter_model.safetensors")
    base = make_model()
    policy = open_policy(base, folder, BLOCK)
    state = policy.state_dict()
    lora = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.{}weight"
    q_proj = make_model().model.layers[2].self_attn.q_proj.weight
    expected = q_proj + 2 * saved[lora.format(2, "B", "")] @ saved[lora.format(2, "A", "")]
    block = "base_model.model.model.layers.2.modules_to_save.default.self_attn.{}.weight"
    assert torch.allclose(state[block.format("q_proj")], expected, atol=1e-6)
    assert torch.equal(state[block.format("k_proj")], make_model().model.layers[2].self_attn.k_proj.weight)
    for index in (0, 1):
        for matrix in "AB":
            kept = state[lora.format(index, matrix, "default.")]
            assert torch.equal(kept, saved[lora.format(index, matrix, "")])


@pytest.mark.parametrize("unfreeze", [NOTHING, ALL], ids=["lora", "opened"])
def test_a_second_adapter_as_trl_makes_it_does_not_move_with_the_policy(
    make_model: Make, write_adapter: Write, logits_of: Logits, unfreeze: Unfreeze
) -> None:
    """TRL copies `default` to `ref`, name for name; then every weight that trains is moved."""
    folder, expected = write_adapter(make_model("llama", **TIED))
    policy = open_policy(make_model("llama", **TIED), folder, unfreeze).eval()
    policy.add_adapter("ref", policy.peft_config["default"])
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert (logits_of(policy) - expected).abs().max() > 0.1
    policy.set_adapter("ref")
    assert (logits_of(policy) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"target_modules": r".*\.(q_proj|down_proj)"}], ids=["lora", "dora", "pattern"]
)
def test_a_saved_policy_reopened_by_stock_peft_is_the_policy(
    make_model: Make,
    write_adapter: Write,
    logits_of: Logits,
    tiny_tokenizer: Any,
    tmp_path: Path,
    lora: dict[str, Any],
) -> None:
    folder, _ = write_adapter(make_model("llama", **TIED), **lora)
    policy = open_policy(make_model("llama", **TIED), folder, ALL).eval()
    policy.add_adapter("ref", policy.peft_config["default"])
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = logits_of(policy)
    save_adapter(policy, tiny_tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved" / "ref").exists()
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    reopened = PeftModel.from_pretrained(make_model("llama", **TIED), tmp_path / "saved").eval()
    assert torch.equal(logits_of(reopened), expected)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["lm_head", "model.layers.2", "model.norm"]
    assert config["layers_to_transform"] == (None if isinstance(config["target_modules"], str) else [0, 1])


@pytest.mark.parametrize("unfreeze", [NORM, Unfreeze(final_norm=True, lm_head=True), ALL], ids=["same", "head", "all"])
@pytest.mark.parametrize("tied", [TIED, UNTIED], ids=["tied", "untied"])
def test_modules_that_sft_opened_keep_what_they_learned(
    make_model: Make, write_adapter: Write, logits_of: Logits, tied: dict[str, bool], unfreeze: Unfreeze
) -> None:
    folder, expected = write_adapter(make_model("llama", **tied), modules_to_save=["model.norm"])
    learned = load_file(folder / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert (learned - 1).abs().max() > 0.01  # a fresh RMSNorm is all ones
    policy = open_policy(make_model("llama", **tied), folder, unfreeze).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    norm = policy.get_parameter("base_model.model.model.norm.modules_to_save.default.weight")
    assert norm.requires_grad
    assert torch.equal(norm.detach(), learned)


def test_a_tied_head_that_sft_opened_stays_apart_from_the_embeddings(
    make_model: Make, write_adapter: Write, logits_of: Logits
) -> None:
    folder, expected = write_adapter(make_model("llama", **TIED), modules_to_save=["lm_head"])
    policy = open_policy(make_model("llama", **TIED), folder, ALL).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    embeddings = policy.get_base_model().get_input_embeddings()
    assert torch.equal(embeddings.weight, make_model("llama", **TIED).model.embed_tokens.weight)


def test_what_is_opened_on_a_bfloat16_base_trains_in_float32(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model("llama", **UNTIED))
    policy = open_policy(make_model("llama", **UNTIED).to(torch.bfloat16), folder, ALL)
    assert {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad} == {torch.float32}
    frozen = policy.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    assert frozen.dtype == torch.bfloat16


def refusal(base: Any, folder: Path, unfreeze: Unfreeze = NOTHING) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        open_policy(base, folder, unfreeze)
    return caught.value


@pytest.mark.parametrize(
    ("modules", "unfreeze", "said"),
    [
        # PEFT matches ends of names, at a dot or not: the two norms of each of three blocks, and the last one.
        (["norm"], NORM, "model.layers.0.input_layernorm, model.layers.0.post_attention_layernorm, "),
        (["norm"], ALL, "model.layers.1.input_layernorm and 1 more, and only whole blocks"),
    ],
)
def test_an_adapter_that_carries_what_dpo_would_not_open_is_refused(
    make_model: Make, write_adapter: Write, modules: list[str], unfreeze: Unfreeze, said: str
) -> None:
    lora = {"layers_to_transform": [0], "target_modules": ["q_proj"]}
    folder, _ = write_adapter(make_model("llama", **UNTIED), modules_to_save=modules, **lora)
    error = refusal(make_model("llama", **UNTIED), folder, unfreeze)
    assert (error.code, error.pointer, error.file) == ("conflict", "/dpo/unfreeze", str(folder))
    assert said in error.message


def test_a_norm_carried_inside_an_opened_block_is_opened_with_it(
    make_model: Make, write_adapter: Write, logits_of: Logits
) -> None:
    carried = "model.layers.2.input_layernorm"
    folder, expected = write_adapter(make_model(), modules_to_save=[carried])
    policy = open_policy(make_model(), folder, BLOCK).eval()
    assert (logits_of(policy) - expected).abs().max() < 1e-4
    assert policy.peft_config["default"].modules_to_save == ["model.layers.2"]


@pytest.mark.parametrize(
    ("lora", "unfreeze"),
    [({}, Unfreeze(last_blocks=3)), ({"layers_to_transform": [2]}, BLOCK)],
    ids=["all", "upper"],
)
def test_opening_every_block_with_lora_is_refused(
    make_model: Make, write_adapter: Write, lora: dict[str, Any], unfreeze: Unfreeze
) -> None:
    folder, _ = write_adapter(make_model(), **lora)
    error = refusal(make_model(), folder, unfreeze)
    assert (error.code, error.pointer) == ("conflict", "/dpo/unfreeze/last_blocks")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
        AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9),  # a subclass of LoraConfig
    ],
    ids=["ia3", "adalora"],
)
def test_an_adapter_of_another_kind_is_refused(make_model: Make, tmp_path: Path, config: Any) -> None:
    get_peft_model(make_model(), config).save_pretrained(tmp_path / "other")
    error = refusal(make_model(), tmp_path / "other")
    assert error.code == "unsupported-adapter"
    assert type(config).__name__ in error.message


def test_a_lora_for_another_task_is_refused(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
    error = refusal(make_model(), folder)
    assert error.code == "unsupported-adapter"
    assert "for SEQ_CLS" in error.message


@pytest.mark.parametrize(
    ("changes", "lora", "said"),
    [
        ({}, {"init_lora_weights": "pissa"}, "`init_lora_weights: pissa`"),
        ({}, {"init_lora_weights": "olora"}, "`init_lora_weights: olora`"),
    ],
    ids=["pissa", "olora"],
)
def test_an_adapter_that_changes_the_base_itself_is_refused(
    make_model: Make, write_adapter: Write, changes: dict[str, Any], lora: dict[str, Any], said: str
) -> None:
    """The reference would share the change: TRL's `ref` adapter stands on the same base."""
    folder, _ = write_adapter(make_model("llama", **changes), **lora)
    error = refusal(make_model("llama", **changes), folder)
    assert error.code == "unsupported-adapter"
    assert said in error.message


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_outside_the_blocks_is_refused(make_model: Make, write_adapter: Write, target: str) -> None:
    folder, _ = write_adapter(make_model("llama", **UNTIED), target_modules=["q_proj", target])
    error = refusal(make_model("llama", **UNTIED), folder)
    assert error.code == "unsupported-adapter"
    assert target in error.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "size mismatch"),
        ({"num_hidden_layers": 4}, "it holds weights for base_model.model.model.layers.3."),
        ({"num_hidden_layers": 2}, "it holds no weights for base_model.model.model.layers.2."),
    ],
    ids=["wider", "deeper", "shallower"],
)
def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace(
    make_model: Make, write_adapter: Write, logits_of: Logits, changes: dict[str, Any], said: str
) -> None:
    """PEFT itself loads those of a deeper or shallower base, with what is missing left at zero."""
    folder, _ = write_adapter(make_model("llama", **changes))
    error = refusal(make_model(), folder)
    assert error.code == "adapter-mismatch"
    assert said in error.message
    base = make_model()
    with pytest.raises(PipelineError) as caught, attached(base, folder):
        pass
    assert caught.value.code == "adapter-mismatch"
    assert torch.equal(logits_of(base), logits_of(make_model()))
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("place", ["peft.PeftModel.from_pretrained", "peft.utils.save_and_load.safe_load_file"])
def test_a_defect_of_ours_is_not_taken_for_a_wrong_adapter(
    make_model: Make, write_adapter: Write, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """PEFT called with what it does not know, and code of ours that PEFT calls."""
    folder, _ = write_adapter(make_model())
    defect: dict[str, Any] = {"__name__": "pipeline.somewhere"}
    exec("def called(*given, **more): raise TypeError('a defect')", defect)
    monkeypatch.setattr(place, defect["called"])
    with pytest.raises(TypeError), attached(make_model(), folder):
        pass


def test_an_adapter_for_layers_that_the_base_has_not_is_refused(make_model: Make, write_adapter: Write) -> None:
    folder, _ = write_adapter(make_model("gpt2"), **GPT2_LORA)
    assert refusal(make_model("llama"), folder).code == "adapter-mismatch"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("adapter_model.safetensors", lambda content: content[:-40]),
        ("adapter_model.safetensors", lambda content: b"<html>"),
        ("adapter_config.json", lambda content: content[:-40]),
        ("adapter_config.json", lambda content: b"[]"),
    ],
    ids=["cut-weights", "page", "cut-config", "list"],
)
def test_a_damaged_adapter_is_an_error_that_names_the_file(
    make_model: Make, write_adapter: Write, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    folder, _ = write_adapter(make_model())
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    error = refusal(make_model(), folder)
    assert (error.code, error.file) == ("damaged-adapter", str(folder / name))
    with pytest.raises(PipelineError, match="damaged-adapter"), attached(make_model(), folder):
        pass


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_an_error_that_says_what_is_missing(
    make_model: Make, write_adapter: Write, missing: str
) -> None:
    folder, _ = write_adapter(make_model())
    assert require_adapter(folder) == folder
    (folder / missing).unlink()
    for call in (require_adapter, lambda path: open_policy(None, path, NOTHING)):
        with pytest.raises(PipelineError, match=f"it holds no {missing}") as caught:
            call(folder)
        assert caught.value.code == "no-adapter"


def test_adapter_sha256_is_that_of_the_weights_file(tmp_path: Path) -> None:
    """SHA-256 of `abc`: FIPS 180-2, appendix B.1."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert adapter_sha256(tmp_path) == expected == hashlib.sha256(b"abc").hexdigest()


def test_a_base_that_was_attached_can_be_opened_for_dpo(
    make_model: Make, write_adapter: Write, logits_of: Logits
) -> None:
    """As DPO does: the SFT model is scored, then its adapter becomes the policy on the same base."""
    folder, expected = write_adapter(make_model("llama", **TIED))
    base = make_model("llama", **TIED)
    with attached(base, folder) as model:
        assert torch.equal(logits_of(model), expected)
    assert (logits_of(open_policy(base, folder, ALL).eval()) - expected).abs().max() < 1e-4
