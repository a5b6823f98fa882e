"""NF4 with double quantisation on the CPU, where bitsandbytes has it: both stages, the proof and the merge.

Not tested here: CUDA, and with it paged optimizers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model.base import find_base, load_base
from pipeline.model.device import place
from pipeline.model.precision import dequantize, hold_in_float32, is_quantized
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft
from tests.tiny import LLAMA, config_of, save_model

OPENED = {"last_blocks": 1, "final_norm": True, "lm_head": True, "learning_rate": 1.0e-3}
IDS = torch.arange(3, 40)[None]

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Merge lora module to 4-bit linear")


@pytest.fixture(scope="module")
def wide_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny model, of width 64: NF4 packs blocks of 64 weights."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = config_of("Llama", tiny_tokenizer, **{**LLAMA, **sizes})
    return save_model(tmp_path_factory.mktemp("wide-llama"), config, tiny_tokenizer)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def stock(folder: Path, skip: list[str]) -> Any:
    """The base in four bits as Transformers loads it; `skip` names modules that stay as they are."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *skip],
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def test_what_is_opened_is_dequantised_to_the_weights_that_computed(wide_folder: Path) -> None:
    from pipeline.experiment import Model

    model = Model(id=str(wide_folder), quantize="nf4", device="cpu")
    base = load_base(find_base(model), model, place("cpu", "auto"))
    before = logits_of(base)
    whole = LlamaForCausalLM.from_pretrained(wide_folder)
    assert is_quantized(base)
    assert (before - logits_of(whole)).abs().max() > 0.05  # four bits are seen
    hold_in_float32(base, ["model.layers.2"])
    assert {parameter.dtype for parameter in base.model.layers[2].parameters()} == {torch.float32}
    assert is_quantized(base.model.layers[1])
    # NF4 has 16 values for each block of 64 weights of a row, up to the rounding of a block's scale.
    row = base.model.layers[2].mlp.up_proj.weight[0]
    assert len(row.unique()) <= 16
    original = whole.model.layers[2].mlp.up_proj.weight[0]
    assert (row - original).abs().max() < 0.2 * original.abs().max()
    dequantize(base, [""])
    assert not is_quantized(base)
    assert (logits_of(base) - before).abs().mean() < 0.05  # float32 in place of bfloat16 products


def test_gradients_flow_through_four_bits_after_an_evaluation(wide_folder: Path) -> None:
    """As those of the same weights in float32 do, up to products in bfloat16; the proof scores before it trains."""
    from pipeline.experiment import Model

    model = Model(id=str(wide_folder), quantize="nf4", device="cpu")
    base = load_base(find_base(model), model, place("cpu", "auto"))
    logits_of(base.eval())

    def gradient() -> torch.Tensor:
        states = base.get_input_embeddings()(IDS).detach().requires_grad_()
        base.train()(inputs_embeds=states, use_cache=False).logits.log_softmax(dim=-1)[..., 7].sum().backward()
        return states.grad

    packed = gradient()
    dequantize(base, [""])
    whole = gradient()
    assert torch.nn.functional.cosine_similarity(packed.flatten(), whole.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(
    ("scope", "dpo"),
    [({}, {}), ({}, {"unfreeze": OPENED}), ({}, {"unfreeze": OPENED, "adapter": "frozen"}), ({}, {"adapter": "new"})],
    ids=["lora", "opened", "frozen", "new"],
)
def test_both_stages_on_a_base_in_four_bits(
    wide_folder: Path,
    write_experiment: Callable[..., Path],
    tmp_path: Path,
    console: Any,
    scope: dict[str, Any],
    dpo: dict[str, Any],
) -> None:
    short = {"max_steps": 2, "warmup_steps": 0, "save_strategy": "no", "eval_strategy": "no"}
    path = write_experiment(
        model={"id": str(wide_folder), "device": "cpu", "quantize": "nf4"}, sft=short, dpo={**short, **dpo}
    )
    experiment = load_experiment(path).experiment
    run_sft(experiment, tmp_path / "runs", console)
    outcome = run_dpo(experiment, tmp_path / "runs", console)
    assert outcome.more["reference"]["drift"] == 0.0  # the CPU does the same sums again
    opened = ["model.layers.2"] if "unfreeze" in dpo else []
    reopened = PeftModel.from_pretrained(stock(wide_folder, opened), outcome.run / "adapter").eval()
    proof = json.loads((outcome.run / "run.json").read_text())["reference"]["saved"]
    assert proof["policy"] < 1.0
    trained = {
        name: p.dtype for name, p in reopened.named_parameters() if "lora_" in name or ".modules_to_save." in name
    }
    assert set(trained.values()) == {torch.float32}
    assert torch.isfinite(logits_of(reopened)).all()


def test_the_merged_model_is_what_the_four_bits_compute(
    wide_folder: Path, write_experiment: Callable[..., Path], tmp_path: Path, console: Any
) -> None:
    from pipeline.model.merge import merge_named

    path = write_experiment(
        model={"id": str(wide_folder), "device": "cpu", "quantize": "nf4"},
        sft={"max_steps": 1, "warmup_steps": 0, "save_strategy": "no", "eval_strategy": "no"},
    )
    run = run_sft(load_experiment(path).experiment, tmp_path / "runs", console).run
    merged = merge_named(tmp_path / "runs", "lights/sft-001", tmp_path / "merged", None, console.print)
    assert merged.apart <= merged.allowed
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(plain.config, "quantization_config")
    adapted = PeftModel.from_pretrained(stock(wide_folder, []), run / "adapter").eval()
    assert (logits_of(plain) - logits_of(adapted)).abs().mean() < 0.05
    unquantised = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide_folder), run / "adapter").eval()
    nearer = (logits_of(plain) - logits_of(adapted)).abs().mean()
    assert nearer < (logits_of(plain) - logits_of(unquantised)).abs().mean()


def test_without_bitsandbytes_the_error_says_what_to_type(
    wide_folder: Path,
    write_experiment: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    console: Any,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    path = write_experiment(model={"id": str(wide_folder), "device": "cpu", "quantize": "nf4"})
    with pytest.raises(PipelineError) as caught:
        run_sft(load_experiment(path).experiment, tmp_path / "runs", console)
    assert (caught.value.code, caught.value.pointer) == ("missing-package", "/model/quantize")
    assert caught.value.mend == "pip install 'preference-pipeline[quantize]'"
    assert not (tmp_path / "runs").exists()


def test_an_optimizer_of_bitsandbytes_is_checked_before_anything_is_loaded(
    write_experiment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, console: Any
) -> None:
    path = write_experiment(sft={"options": {"optim": "paged_adamw_8bit"}})
    with pytest.raises(PipelineError, match="pages its state between GPU and CPU") as caught:
        run_sft(load_experiment(path).experiment, tmp_path / "runs", console)
    assert (caught.value.code, caught.value.pointer) == ("conflict", "/sft/options/optim")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(PipelineError) as caught:
        run_sft(load_experiment(path).experiment, tmp_path / "runs", console)
    assert (caught.value.code, caught.value.pointer) == ("missing-package", "/sft/options/optim")
