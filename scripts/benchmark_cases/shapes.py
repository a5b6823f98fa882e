"""Models of a known shape with random weights: what a step costs does not depend on what the weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
}
"""Of published configurations, for `LlamaConfig`."""


def write_random(folder: Path, shape: dict[str, Any], at: Any) -> None:
    """A Llama with random weights, beside the built-in model's tokenizer, whose tokens it has more than enough for.

    Args:
        folder: does not exist yet.
        shape: of SHAPES.
        at: the device that draws the weights, and their precision on the disk.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pipeline.model.builtin import builtin_model
    from pipeline.model.device import give_memory_back

    tokenizer = AutoTokenizer.from_pretrained(builtin_model("builtin:smollm2-135m"))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(at.dtype)
    try:
        with at.device:
            model = LlamaForCausalLM(LlamaConfig(**shape, **special))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    give_memory_back()  # the sides are processes of their own, and need it
