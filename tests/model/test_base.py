from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Model
from pipeline.model.base import BaseFiles, find_base, load_base, load_tokenizer, template_sha256
from pipeline.model.device import Placement

CPU = Placement(torch.device("cpu"), torch.float32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


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


# The hub


@pytest.fixture
def cache(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, laid out as it lays it out: `org/tiny` at `main`, and an older commit with a tag; offline."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(OLDER)
    (repository / "blobs").mkdir()
    for commit in (COMMIT, OLDER):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in tiny_folder.iterdir():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, COMMIT), ("main", COMMIT), ("v1", OLDER), (OLDER, OLDER)],
    ids=["default", "branch", "tag", "commit"],
)
def test_a_cached_hub_model_is_found_at_the_commit_of_its_revision(
    cache: Path, revision: str | None, commit: str
) -> None:
    files = find_base(Model(id="org/tiny", revision=revision))
    assert files == BaseFiles("org/tiny", cache / "snapshots" / commit, None, commit)


def test_a_hub_model_is_named_by_its_id_and_not_by_the_cache(cache: Path) -> None:
    """An adapter's configuration names its base by this."""
    loaded = load_base(find_base(Model(id="org/tiny")), Model(), CPU)
    assert loaded.name_or_path == "org/tiny"


@pytest.mark.parametrize(
    ("model_id", "revision", "command"),
    [
        ("org/other", None, "`hf download org/other`"),
        ("org/tiny", "v2", "`hf download org/tiny --revision v2`"),
        ("org/tiny", "f" * 40, f"`hf download org/tiny --revision {'f' * 40}`"),
        ("tiny", None, "`hf download tiny`"),
    ],
)
def test_a_hub_model_that_is_not_cached_is_an_error_with_the_command_to_fetch_it(
    cache: Path, model_id: str, revision: str | None, command: str
) -> None:
    error = refusal(model_id, revision)
    assert (error.code, error.pointer, error.exit_code) == ("model-not-cached", "/model/id", ExitCode.USAGE)
    assert "HF_HUB_OFFLINE is set" in error.message
    assert command in error.mend


def test_a_cached_hub_model_without_safetensors_is_refused(cache: Path) -> None:
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert refusal("org/tiny").code == "no-safetensors"


@pytest.mark.parametrize("model_id", ["org/a--b", "org/tiny.git", "a..b", "-tiny"])
def test_an_id_that_the_hub_does_not_allow(model_id: str) -> None:
    error = refusal(model_id)
    assert (error.code, error.pointer) == ("unknown-model", "/model/id")
    assert f"{model_id} is no id of the hub" in error.message


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*arguments: Any, **settings: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def http_error(kind: type[hub_errors.HfHubHTTPError]) -> hub_errors.HfHubHTTPError:
    return kind("4xx Client Error", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "code", "pointer", "mend"),
    [
        (hub_errors.GatedRepoError, "licence-not-accepted", "/model/id", "accept it on the page of org/tiny"),
        (hub_errors.RepositoryNotFoundError, "unknown-model", "/model/id", "hf auth login"),
        (hub_errors.RevisionNotFoundError, "unknown-revision", "/model/revision", "branch, tag or commit"),
        (hub_errors.HfHubHTTPError, "model-not-cached", "/model/id", "hf download org/tiny --revision v9"),
    ],
)
def test_what_the_hub_refuses_is_an_error_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, kind: type[hub_errors.HfHubHTTPError], code: str, pointer: str, mend: str
) -> None:
    hub_raises(monkeypatch, http_error(kind))
    error = refusal("org/tiny", "v9")
    assert (error.code, error.pointer, error.exit_code) == (code, pointer, ExitCode.USAGE)
    assert "org/tiny" in error.message
    assert mend in error.mend


@pytest.mark.parametrize(
    "error", [ConnectionError("refused"), RuntimeError("a chunk was cut off")], ids=["connection", "library"]
)
def test_a_broken_connection_is_said_as_one(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The HTTP library's own errors are of no class that is ours to name."""
    hub_raises(monkeypatch, error)
    refused = refusal("org/tiny")
    assert refused.code == "model-not-cached"
    assert "the hub cannot be reached" in refused.message


def test_a_full_disk_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/cache/blob"))
    error = refusal("org/tiny")
    assert (error.code, error.exit_code, error.file) == ("cannot-write", ExitCode.MACHINE, "/cache/blob")
    assert "No space left on device" in error.message


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


def test_the_cache_and_a_copy_of_it_hash_alike(cache: Path, tiny_folder: Path) -> None:
    assert find_base(Model(id="org/tiny")).sha256() == local(tiny_folder).sha256()


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
    assert error.mend == "pip install bitsandbytes"


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
    ],
    ids=["model", "tokenizer"],
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


# GGUF


@pytest.fixture(scope="module")
def gguf_file(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama in float32, under llama.cpp's names; its query and key rows interleave the rotary halves."""
    import gguf

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
