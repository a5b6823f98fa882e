"""Base models of the hub, on a cache built by hand and a hub that fails as told."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Model
from pipeline.model.base import BaseFiles, find_base, load_base
from pipeline.model.device import Placement

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


def refusal(model_id: str, revision: str | None = None) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        find_base(Model(id=model_id, revision=revision))
    return caught.value


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


def test_neither_pickles_nor_code_are_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or tmp_path)
    refusal("org/tiny")
    wanted = ["config.json", "tokenizer.json", "chat_template.jinja", "model-00001-of-00002.safetensors"]
    names = [*wanted, "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "x.pkl", "x.npz", "modeling_own.py"]
    fetched = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=asked["allow_patterns"])
    assert list(fetched) == wanted


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
    loaded = load_base(find_base(Model(id="org/tiny")), Model(), Placement(torch.device("cpu"), torch.float32))
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


def test_the_cache_and_a_copy_of_it_hash_alike(cache: Path, tiny_folder: Path) -> None:
    assert find_base(Model(id="org/tiny")).sha256() == BaseFiles("tiny", tiny_folder, None, None).sha256()
