"""A tiny chat model on the disk, and an experiment on it: what most tests start from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.rows import Preference
from tests.tiny import LLAMA, config_of, make_tokenizer, save_model, splits_of

# Before any library reads them: no hub, no tracking server, the same sums on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("WANDB_MODE", None)


@pytest.fixture(autouse=True)
def own_references(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds, or leaves, a reference in the user's cache; models there are found."""
    from pipeline import cache

    stock, folder = cache.folder_of, tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(cache, "folder_of", lambda kind: folder / kind if kind == "references" else stock(kind))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level, ChatML, and its pad token is its eos token, as SmolLM2's is."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks and some fifty thousand parameters, head tied, saved with its tokenizer."""
    config = config_of("Llama", tiny_tokenizer, **LLAMA)
    return save_model(tmp_path_factory.mktemp("tiny-llama"), config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Demonstrations (two of them with two assistant turns) and preferences, each with a held-out file."""
    folder = tmp_path_factory.mktemp("data")
    colours = ["red", "green", "blue", "white", "black", "pink", "grey", "brown", "gold", "teal", "plum", "lime"]

    def demonstration(colour: str, *, long: bool) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": f"Which light is on? I see {colour}."},
            {"role": "assistant", "content": f"The {colour} light is on."},
        ]
        if long:
            messages += [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": f"Still {colour}."}]
        return {"messages": messages}

    def preference(colour: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": f"Which light is on? I see {colour}."}],
            "chosen": [{"role": "assistant", "content": f"The {colour} light is on."}],
            "rejected": [{"role": "assistant", "content": f"It is {colour}, soon it will be off."}],
        }

    rows = {
        "demonstrations": [demonstration(colour, long=at < 2) for at, colour in enumerate(colours)],
        "demonstrations-eval": [demonstration(colour, long=False) for colour in ("mint", "rust", "sand", "navy")],
        "preferences": [preference(colour) for colour in colours],
        "preferences-eval": [preference(colour) for colour in ("mint", "rust", "sand", "navy")],
    }
    files = {}
    for name, some in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return files


@pytest.fixture
def definition(tiny_folder: Path, tiny_data: dict[str, Path]) -> dict[str, Any]:
    """An experiment on the tiny model, as a plain value that a test may change."""
    rhythm = {"per_device_train_batch_size": 4, "max_length": 128, "warmup_steps": 0.1}
    return {
        "name": "lights",
        "seed": 3,
        "model": {"id": str(tiny_folder), "device": "cpu"},
        "data": splits_of(tiny_data),
        "scope": {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05}},
        "sft": {**rhythm, "num_train_epochs": 4, "learning_rate": 5.0e-2},
        "dpo": {**rhythm, "num_train_epochs": 2, "learning_rate": 5.0e-3},
        "evaluation": {
            "prompts": str(tiny_data["demonstrations-eval"]),
            "max_new_tokens": 12,
            "checks": {"polite": {"must_not_match": "soon"}},
        },
        "tracking": {"wandb": {"mode": "disabled"}},
    }


@pytest.fixture
def write_experiment(tmp_path: Path, definition: dict[str, Any]) -> Callable[..., Path]:
    """Writes the experiment with changes, given as `dpo={"beta": 0.2}`; the changed keys are merged in."""

    def write(**changes: Any) -> Path:
        merged = dict(definition)
        for key, value in changes.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def console() -> Any:
    """A console that keeps what is printed: `console.file.getvalue()`."""
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=120, soft_wrap=True)


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


@pytest.fixture
def conversations() -> list[Preference]:
    """The prompt of the third has more than 64 tokens."""
    return [
        Preference(
            turns("The printer is on fire."),
            answer("Put it out."),
            answer("Print again, please, and then again."),
        ),
        Preference(turns("Hi", "Hello", "On?"), answer("Yes."), answer("")),
        Preference(turns("fire? " * 40), answer("a"), answer("b")),
    ]


@pytest.fixture
def texts() -> list[Preference]:
    """A token of the second's rejected text reaches over the boundary; the third prompt has more than 64 tokens."""
    return [
        Preference("The printer is", " on fire.", " fine<|im_end|>"),
        Preference("It works aga", " no", "in, thank you!"),
        Preference("fire? " * 40, "a", "b"),
    ]


@pytest.fixture(params=["conversations", "texts"])
def preferences(request: pytest.FixtureRequest) -> list[Preference]:
    return list(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    import torch
    from transformers import LlamaForCausalLM

    # So that answers differ from prompt to prompt.
    shape = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": False, "initializer_range": 0.3}

    def make(seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return LlamaForCausalLM(config_of("Llama", tiny_tokenizer, **{**shape, **changes})).eval()

    return make


@pytest.fixture
def chat_model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that multiplied with the sum of their weight and its LoRA, one entry a call."""
    from pipeline.training.engine import linear

    layers: list[Any] = []
    stock = linear._sum_forward

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        layers.append(layer)
        return stock(layer, *args, **kwargs)

    monkeypatch.setattr(linear, "_sum_forward", counted)
    return layers
