from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import cache
from pipeline.cli import main


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model of 7 bytes and a reference of 5 bytes beside its key."""
    monkeypatch.setattr(cache, "folder_of", lambda kind: tmp_path / kind)
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "weights").write_bytes(b"1234567")
    (tmp_path / "references" / "r").mkdir(parents=True)
    (tmp_path / "references" / "r" / "x.safetensors").write_bytes(b"12345")
    (tmp_path / "references" / "r" / cache.KEY).write_text('{"adapter_sha256": "abc", "precision": "float32"}')
    return tmp_path


def answer(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(["cache", "--format", "json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_is_shown_with_sizes_and_what_it_is_of(kept: Path, capsys: Any) -> None:
    model, reference = answer(capsys)["entries"]
    assert (model["kind"], model["bytes"], model["path"]) == ("models", 7, str(kept / "models" / "m"))
    assert reference["key"]["adapter_sha256"] == "abc"
    assert reference["bytes"] == 5 + len('{"adapter_sha256": "abc", "precision": "float32"}')
    assert main(["cache"]) == 0
    assert "pipeline cache --clear references" in capsys.readouterr().out


def test_one_kind_is_cleared_and_the_other_stays(kept: Path, capsys: Any) -> None:
    found = answer(capsys, "--clear", "references")
    assert [entry["kind"] for entry in found["entries"]] == ["models"]
    assert found["cleared_bytes"] > 5
    assert (kept / "models" / "m" / "weights").is_file()
    assert answer(capsys, "--clear", "all")["entries"] == []
    assert answer(capsys, "--clear", "all")["cleared_bytes"] == 0
