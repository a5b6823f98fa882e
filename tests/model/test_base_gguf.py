"""A base model that is a GGUF file, written here weight by weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

from pipeline.experiment import Model
from pipeline.experiment_file import load_experiment
from pipeline.model import builtin
from pipeline.model.base import find_base, load_base, load_tokenizer
from pipeline.model.device import Placement
from pipeline.plan.outline import outline

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def gguf_file(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama in float32, under llama.cpp's names; its query and key rows interleave the rotary halves."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for block in range(3):
        names |= {f"model.layers.{block}.{ours}": f"blk.{block}.{theirs}" for ours, theirs in inside.items()}
    model = make_model("llama", tie_word_embeddings=False)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("!") + index) for index in range(62)] + ["!!", "<|end|>"])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(63)
    for ours, theirs in names.items():
        weight = model.get_submodule(ours).weight.detach()
        heads = {"q_proj": 4, "k_proj": 2}.get(ours.rpartition(".")[2])
        if heads is not None:
            weight = weight.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_model_is_loaded_and_can_be_saved(
    gguf_file: Path, make_model: Callable[..., Any], logits_of: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    loaded = load_base(find_base(Model(id=str(gguf_file))), Model(), CPU)
    expected = logits_of(make_model("llama", tie_word_embeddings=False))
    assert torch.allclose(logits_of(loaded), expected, atol=1e-5)
    loaded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(loaded))


def test_a_gguf_file_brings_its_tokenizer(gguf_file: Path) -> None:
    tokenizer = load_tokenizer(find_base(Model(id=str(gguf_file))), Model(), None)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|end|>")
    assert tokenizer("A!!").input_ids == [32, 62]  # `!` is 0, and 33 in ASCII, where `A` is 65


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a GGUF file was parsed from a plain array, and a table of names made."""
    count: Counter[str] = Counter()
    parse, table = gguf.GGUFReader.__init__, gguf.get_tensor_name_map

    def counted_parse(self: Any, *arguments: Any) -> None:
        parse(self, *arguments)
        count["parsed"] += type(self.data) is np.ndarray

    def counted_table(*arguments: Any) -> Any:
        count["tables"] += 1
        return table(*arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted_parse)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted_table)
    return count


def test_a_gguf_file_is_read_once_and_without_bars(
    gguf_file: Path,
    made: Counter[str],
    write_experiment: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Transformers by itself parses three times: for the configuration, the weights and the tokenizer."""
    loader = modeling_gguf_pytorch_utils
    stock = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm
    builtin._convert(gguf_file, tmp_path / "converted")
    assert made == {"parsed": 1, "tables": 1}
    files = find_base(Model(id=str(gguf_file)))
    load_base(files, Model(), CPU)
    assert made == {"parsed": 2, "tables": 2}
    load_tokenizer(files, Model(), None)
    assert made == {"parsed": 3, "tables": 2}
    experiment = load_experiment(write_experiment(model={"id": str(gguf_file)})).experiment
    outline(files, experiment, "sft", torch.float32)
    assert made == {"parsed": 4, "tables": 2}
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm) == stock
    assert "%|" not in capfd.readouterr().err
