"""Tiny models of random numbers and their tokenizer, by libraries alone: nothing of the project is used here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
"""Four blocks and some fifty thousand parameters, the head tied."""


def make_tokenizer() -> Any:
    """Byte-level, ChatML, and its pad token is its eos token, as SmolLM2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["The red light is on.", "The printer is on fire.", "It works again, thank you!"] * 4, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config_of(kind: str, tokenizer: Any, **settings: Any) -> Any:
    """A configuration of Transformers, `kind` its name without `Config`, for the tokenizer's tokens."""
    import transformers

    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return getattr(transformers, f"{kind}Config")(**{**tokens, **settings})


def save_model(folder: Path, config: Any, tokenizer: Any) -> Path:
    """A model of random weights, the same ones each time, saved with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def splits_of(files: dict[str, Path]) -> dict[str, dict[str, str]]:
    """The section `data` of an experiment on files named `demonstrations`, `demonstrations-eval` and so on."""
    return {
        kind: {"train": str(files[kind]), "eval": str(files[f"{kind}-eval"])}
        for kind in ("demonstrations", "preferences")
    }
