from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.runs.provenance import provenance


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder that belongs to no repository, and git without its user's settings."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    return inside


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    answer = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def test_there_is_no_git_outside_a_repository(folder: Path) -> None:
    assert provenance()["git"] is None


def test_there_is_no_git_before_the_first_commit(folder: Path) -> None:
    git(folder, "init")
    assert provenance()["git"] is None


def test_there_is_no_git_without_the_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(folder, "init")
    git(folder, "commit", "--allow-empty", "-m", "first")
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"] is None


def test_commit_and_whether_the_tree_differs_from_it(folder: Path) -> None:
    git(folder, "init")
    (folder / "a").write_text("one")
    git(folder, "add", "a")
    git(folder, "commit", "-m", "first")
    commit = git(folder, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert provenance()["git"] == {"commit": commit, "dirty": False}
    (folder / "a").write_text("two")
    assert provenance()["git"] == {"commit": commit, "dirty": True}
    git(folder, "commit", "-am", "second")
    assert provenance()["git"] == {"commit": git(folder, "rev-parse", "HEAD"), "dirty": False}
    (folder / "new").touch()
    assert provenance()["git"]["dirty"] is True


def test_the_command_line_is_that_of_the_process_unless_it_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", "sft", "triage.yaml"])
    assert provenance()["argv"] == ["pipeline", "sft", "triage.yaml"]
    assert provenance(["pipeline", "dpo"])["argv"] == ["pipeline", "dpo"]


def test_versions_are_those_installed_and_none_for_what_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runs.provenance._LIBRARIES", ("torch", "no-such-library"))
    versions = provenance()["versions"]
    assert versions == {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": version("torch"),
        "no-such-library": None,
    }


def test_the_libraries_that_decide_the_numbers_are_recorded(folder: Path) -> None:
    versions = provenance()["versions"]
    for library in ("preference-pipeline", "torch", "transformers", "peft", "trl", "tokenizers"):
        assert versions[library] == version(library)
    json.dumps(provenance(), allow_nan=False)
