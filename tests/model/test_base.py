from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Experiment, Model
from pipeline.model.base import BaseFiles, find_base, load_base, load_tokenizer, template_sha256
from pipeline.model.device import Placement
from pipeline.plan.outline import outline

CPU = Placement(torch.device("cpu"), torch.float32)


def local(folder: Path) -> BaseFiles:
    return BaseFiles("tiny", folder, None, None)


def refusal(model_id: str, revision: str | None = None) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        find_base(Model(id=model_id, revision=revision))
    return caught.value


# Where the files are


def test_a_local_folder_is_taken_as_it_is(tiny_folder: Path) -> None:
    files = find_base(Model(id=str(tiny_folder)))
    assert files == BaseFiles(str(tiny_folder), tiny_folder, None, None)
    assert [file.name for file in files.weight_files()] == ["model.safetensors"]


def test_a_folder_in_the_home_directory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert find_base(Model(id=f"~/{tiny_folder.name}")).folder == tiny_folder


def test_a_gguf_file_is_its_folder_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4.gguf").touch()
    files = find_base(Model(id=str(tmp_path / "tiny.Q4.gguf")))
    assert (files.folder, files.gguf) == (tmp_path, "tiny.Q4.gguf")
    assert files.weight_files() == [tmp_path / "tiny.Q4.gguf"]


@pytest.mark.parametrize("name", ["./model", "../model", "~/model", "/no/such/model", "a/b/c", "my model"])
def test_a_path_that_does_not_exist_is_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(name)
    assert (error.code, error.pointer) == ("unknown-model", "/model/id")
    assert error.message.startswith("there is no folder ")


def test_a_gguf_file_that_is_missing(tmp_path: Path) -> None:
    error = refusal(str(tmp_path / "tiny.gguf"))
    assert error.code == "unknown-model"
    assert error.message == f"there is no file {tmp_path / 'tiny.gguf'}"


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    error = refusal(str(tmp_path))
    assert error.code == "unknown-model"
    assert "holds no config.json" in error.message


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    error = refusal(str(tmp_path))
    assert (error.code, error.pointer) == ("no-safetensors", "/model/id")
    assert "save_pretrained" in error.mend


# The hash of the weights


def test_the_hash_is_of_names_and_hashes(tmp_path: Path) -> None:
    r"""SHA-256 of `a.safetensors\0 sha256("one") \n b.safetensors\0 sha256("two") \n`, by coreutils' sha256sum."""
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "config.json").write_text("not hashed")
    assert local(tmp_path).sha256() == "b86e0745d0b98c6542235bdea6eb538a7599198ac8e7621ebb072c813f24a314"


def test_one_bit_and_one_name_change_the_hash(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x00\x00")
    before = local(tmp_path).sha256()
    file.write_bytes(b"\x00\x01")
    assert (flipped := local(tmp_path).sha256()) != before
    file.rename(tmp_path / "other.safetensors")
    assert local(tmp_path).sha256() not in (before, flipped)


def test_the_hash_of_a_gguf_model_is_of_that_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"one")
    files = BaseFiles("a", tmp_path, "a.gguf", None)
    before = files.sha256()
    (tmp_path / "b.gguf").write_bytes(b"two")
    (tmp_path / "model.safetensors").write_bytes(b"three")
    assert files.sha256() == before
    assert before == hashlib.sha256(f"a.gguf\0{hashlib.sha256(b'one').hexdigest()}\n".encode()).hexdigest()


def test_a_blob_that_is_named_by_its_hash_is_not_read(tmp_path: Path) -> None:
    """This one's content is of another hash, so that it shows; a link to any other name is read."""
    named = "a" * 64
    (tmp_path / named).write_bytes(b"large file")
    (tmp_path / "model.safetensors").symlink_to(named)
    expected = hashlib.sha256(f"model.safetensors\0{named}\n".encode()).hexdigest()
    assert local(tmp_path).sha256() == expected
    (tmp_path / "blob").write_bytes(b"large file")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("blob")
    content = hashlib.sha256(b"large file").hexdigest()
    assert local(tmp_path).sha256() == hashlib.sha256(f"model.safetensors\0{content}\n".encode()).hexdigest()


# Loading


def test_the_model_is_the_one_on_the_disk(tiny_folder: Path, logits_of: Callable[[Any], torch.Tensor]) -> None:
    loaded = load_base(local(tiny_folder), Model(), CPU)
    assert torch.equal(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(tiny_folder)))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.name_or_path == str(tiny_folder)


def test_precision_and_attention_are_as_asked(tiny_folder: Path) -> None:
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    loaded = load_base(local(tiny_folder), Model(attn_implementation="eager"), placement)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def unloadable(folder: Path, model: Model | None = None) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        load_base(local(folder), model or Model(), CPU)
    return caught.value


@pytest.mark.parametrize("spoil", [lambda content: content[:-1], lambda content: b"<html>"], ids=["cut", "page"])
def test_damaged_weights_are_an_error(copy: Path, spoil: Callable[[bytes], bytes]) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    error = unloadable(copy)
    assert (error.code, error.pointer) == ("unloadable-model", "/model/id")
    assert error.message.startswith("tiny cannot be loaded as a causal language model: ")


def test_pickled_weights_beside_a_file_of_safetensors_are_not_read(copy: Path) -> None:
    """Nor are they a good model's: Transformers takes them where no weights are called `model.safetensors`."""
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    assert AutoModelForCausalLM.from_pretrained(copy) is not None
    find_base(Model(id=str(copy)))
    assert unloadable(copy).code == "unloadable-model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"tie_word_embeddings": False}, "hold no lm_head.weight"),
        ({"num_hidden_layers": 5}, "hold no model.layers.4.input_layernorm.weight, model.layers.4.mlp."),
    ],
    ids=["head", "block"],
)
def test_weights_that_are_not_in_the_files_are_an_error_and_no_random_numbers(
    copy: Path, changes: dict[str, Any], missing: str
) -> None:
    edit_config(copy, **changes)
    error = unloadable(copy)
    assert (error.code, error.pointer) == ("incomplete-model", "/model/id")
    assert missing in error.message


def test_a_model_that_is_no_causal_language_model(copy: Path) -> None:
    edit_config(copy, model_type="t5")
    assert unloadable(copy).code == "unloadable-model"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate")], ids=str)
def test_a_model_that_does_not_fit_into_memory(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    refused = unloadable(tiny_folder)
    assert (refused.code, refused.exit_code) == ("out-of-memory", ExitCode.MACHINE)
    assert "nf4" in refused.mend


def test_quantising_without_bitsandbytes_says_what_to_install(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    error = unloadable(tiny_folder, Model(quantize="nf4"))
    assert (error.code, error.pointer) == ("missing-package", "/model/quantize")
    assert error.mend == "pip install 'preference-pipeline[quantize]'"


@pytest.fixture
def with_code(copy: Path) -> Path:
    """A model and a tokenizer that name Python files of their own; running those leaves a file `ran`."""
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\n")
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(copy, model_type="own", auto_map=own)
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(settings))
    return copy


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_base(local(folder), Model(), CPU),
        lambda folder: load_tokenizer(local(folder), Model(), None),
        lambda folder: outline(local(folder), Experiment(name="x"), "sft", torch.float32),
    ],
    ids=["model", "tokenizer", "plan"],
)
def test_code_that_comes_with_a_model_is_not_run_unasked(with_code: Path, load: Callable[[Path], Any]) -> None:
    with pytest.raises(PipelineError) as caught:
        load(with_code)
    error = caught.value
    assert (error.code, error.pointer) == ("remote-code", "/model/trust_remote_code")
    assert "trust_remote_code: true" in error.mend
    assert not (with_code / "ran").exists()


def test_code_that_comes_with_a_model_is_run_when_asked(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would see it run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(with_code / "modules"))
    assert unloadable(with_code, Model(trust_remote_code=True)).code == "unloadable-model"
    assert (with_code / "ran").exists()


# The tokenizer


def small_tokenizer(folder: Path, **special: str) -> Path:
    backend = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special).save_pretrained(folder)
    return folder


def test_a_missing_pad_token_is_the_eos_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(local(small_tokenizer(tmp_path, eos_token="<eos>")), Model(), None)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<eos>", 1)
    assert tokenizer.padding_side == "right"


def test_a_pad_token_that_is_there_stays(tmp_path: Path) -> None:
    folder = small_tokenizer(tmp_path, eos_token="<eos>", pad_token="<pad>")
    assert load_tokenizer(local(folder), Model(), None).pad_token_id == 2


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        load_tokenizer(local(small_tokenizer(tmp_path)), Model(), None)
    assert (caught.value.code, caught.value.pointer) == ("no-eos-token", "/model/id")


def test_a_folder_without_a_tokenizer_is_an_error(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(PipelineError) as caught:
        load_tokenizer(local(copy), Model(), None)
    assert (caught.value.code, caught.value.pointer) == ("unloadable-tokenizer", "/model/id")


def test_a_chat_template_replaces_the_models_own(tiny_folder: Path, tmp_path: Path) -> None:
    """SHA-256 of `abc`: FIPS 180-2, appendix B.1."""
    (tmp_path / "chat.jinja").write_text("abc")
    own = load_tokenizer(local(tiny_folder), Model(), None)
    other = load_tokenizer(local(tiny_folder), Model(), str(tmp_path / "chat.jinja"))
    assert other.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "abc"
    assert template_sha256(other) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert template_sha256(own) not in (None, template_sha256(other))
    own.chat_template = None
    assert template_sha256(own) is None


@pytest.mark.parametrize("content", [None, b"\xff"], ids=["missing", "not-utf8"])
def test_a_chat_template_that_cannot_be_read(tiny_folder: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        load_tokenizer(local(tiny_folder), Model(), str(path))
    error = caught.value
    assert (error.code, error.pointer) == ("no-such-file", "/tokenizer/chat_template")
    assert str(path) in error.message
