"""Random models of three blocks and width 32, of several architectures, and adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHARED = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_NEOX = {key: value for key, value in _SHARED.items() if key != "num_key_value_heads"}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHARED),
    "qwen2": ("Qwen2Config", _SHARED),
    "qwen3": ("Qwen3Config", {**_SHARED, "head_dim": 8}),
    "mistral": ("MistralConfig", _SHARED),
    "gemma3_text": ("Gemma3TextConfig", {**_SHARED, "head_dim": 8}),
    "phi3": ("Phi3Config", _SHARED),
    "gpt2": (
        "GPT2Config",
        {**_TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    ),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "mixtral": ("MixtralConfig", {**_SHARED, "num_local_experts": 2}),
    "opt": ("OPTConfig", {**_NEOX, "ffn_dim": 64, "word_embed_proj_dim": 32}),
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model("llama", tie_word_embeddings=True)`: the same weights for the same arguments."""
    import transformers

    def make(kind: str = "llama", **changes: Any) -> Any:
        name, settings = _CONFIGS[kind]
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**settings, **changes})
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Any], torch.Tensor]:
    """The logits of a model on sixteen tokens, without gradients."""

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 19)[None]).logits

    return logits


@pytest.fixture
def write_adapter(tmp_path: Path, logits_of: Callable[[Any], torch.Tensor]) -> Callable[..., tuple[Path, torch.Tensor]]:
    """`write_adapter(base, name, r=4)`: an adapter with random weights as stock PEFT saves it.

    It takes `base` for itself. Returns the folder, and the logits of the model that was saved.
    """
    from peft import LoraConfig, get_peft_model

    def write(base: Any, name: str = "adapter", **changes: Any) -> tuple[Path, torch.Tensor]:
        plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        model = get_peft_model(base, LoraConfig(**{"task_type": "CAUSAL_LM", **plain, **changes}))
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / name
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder, logits_of(model.eval())

    return write
