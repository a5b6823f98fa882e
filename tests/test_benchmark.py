"""`scripts/benchmark.py`: the figures that it promises, and models of a known shape with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
POSITIVE = ("ratio_default", "ratio_tuned", "roofline_fraction", "peak_memory_ratio")
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

pytestmark = pytest.mark.builtin_model


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_cases import shapes

    return shapes


@pytest.fixture
def small(shapes: Any, tmp_path: Path) -> Path:
    """Llama 3.1 8B, but for its size."""
    from pipeline.model.device import place

    folder = tmp_path / "small"
    shapes.write_random(folder, shapes.SHAPES["llama-3.1-8b"] | SMALL, place("cpu", "bfloat16"))
    return folder


def test_a_shape_has_the_published_number_of_weights(shapes: Any) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shapes.SHAPES["llama-3.1-8b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_random_weights_open_in_stock_tools(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.model.rotary_emb.rope_type == "llama3"


def test_the_sides_train_alike_and_every_figure_is_there(small: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "dpo", "--model", small, "--rows", "8"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert all(figures[name] > 0 for name in POSITIVE)
    assert figures["max_loss_difference"] < 5e-3
    assert figures["max_margin_difference"] < 5e-3
    assert torch.cuda.is_available() or figures["device"].endswith(", float32")
    steps = {name: side["steps"] for name, side in figures["sides"].items()}
    assert len(steps["ours"]) == 2
    assert all(step["loss"] > 0 for side in steps.values() for step in side)
