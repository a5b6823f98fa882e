from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs import files
from pipeline.runs.files import write_atomically, write_json


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_text_is_written_in_utf8_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "naïve\n")
    assert (tmp_path / "a.txt").read_bytes() == b"na\xc3\xafve\n"
    assert names_in(tmp_path) == ["a.txt"]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """A temporary file is for its owner alone (0600)."""
    write_atomically(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_an_older_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a longer text than the new one")
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("step", ["write", "fsync", "chmod", "rename"])
def test_a_failure_on_the_way_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """`write` fails by a lone surrogate, which UTF-8 cannot say."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise OSError("disk")

    (tmp_path / "a.txt").write_text("old")
    if step == "fsync":
        monkeypatch.setattr(files.os, "fsync", fail)
    elif step == "chmod":
        monkeypatch.setattr(Path, "chmod", fail)
    elif step == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_atomically(tmp_path / "a.txt", "\ud800" if step == "write" else "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_the_old_file_is_there_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append((tmp_path / "a.txt").read_text())
        fsync(descriptor)

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(files.os, "fsync", look)
    write_atomically(tmp_path / "a.txt", "new")
    assert seen == ["old", "new"]  # the file, then the folder that has it


def test_json_is_indented_and_keeps_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "naïve", "n": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "naïve",\n  "n": 1\n}\n'


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_has_no_nan(tmp_path: Path, number: float) -> None:
    write_json(tmp_path / "a.json", {"loss": 0.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": number})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 0.5}
    assert names_in(tmp_path) == ["a.json"]
