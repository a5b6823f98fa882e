"""What other repositories put in front of their data: the hook for pre-commit, and annotations for GitHub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import main
from pipeline.data.github import annotation

ROOT = Path(__file__).resolve().parent.parent
GOOD = "".join(f'{{"prompt": "{number}", "completion": "b"}}\n' for number in range(10))
BAD = '{"prompt": "a", "completion": 5}\n'


@pytest.fixture
def hook() -> Any:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    return hook


def test_the_hook_runs_on_sample_files(hook: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *arguments = shlex.split(hook["entry"])
    assert command == "pipeline"
    for name, text, code in (("good.jsonl", GOOD, 0), ("bad.jsonl", BAD, 1), ("array.json", f"[{BAD}]", 1)):
        path = tmp_path / name
        path.write_text(text)
        assert re.search(hook["files"], str(path))
        assert main([*arguments, str(path)]) == code
    assert "bad.jsonl:1 /completion" in capsys.readouterr().out
    assert not re.search(hook["files"], "notes.md")


def test_the_hook_is_what_pre_commit_reads(hook: Any) -> None:
    assert {"id", "name", "entry", "language"} <= hook.keys()
    assert hook["language"] == "python"
    page = (ROOT / "docs" / "validate-in-ci.md").read_text(encoding="utf-8")
    cloned, local = (
        yaml.safe_load(block)["repos"][0] for block in re.findall(r"```yaml\n(repos:.*?)```", page, re.DOTALL)
    )
    assert cloned["hooks"][0].keys() == {"id", "files", "args"}
    assert cloned["hooks"][0]["id"] == local["hooks"][0]["id"] == hook["id"]
    assert local["hooks"][0]["entry"].startswith(hook["entry"])
    assert f"try-repo PATH-OF-THE-CLONE {hook['id']} " in page


@pytest.mark.parametrize(("text", "code"), [(GOOD, 0), (GOOD + BAD, 1)])
def test_annotations(
    text: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main(["validate", "--format", "github", str(path)]) == code
    expected = (
        "::error file=rows.jsonl,line=11,col=31,title=wrong-type::`completion` is a number, not text /completion: "
    )
    expected += "change the value's type\n"
    assert capsys.readouterr().out == (expected if code else "")


def test_annotations_of_warnings_and_of_what_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(BAD * 5 + GOOD[:200])
    assert main(["validate", "--format", "github", "--max-errors", "2", str(path)]) == 1
    kinds = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert kinds.count("::error") == 2
    assert kinds[-1] == "::notice"


def test_a_wrong_experiment_is_annotated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--format", "github", str(tmp_path / "gone.yaml")]) == 2
    assert capsys.readouterr().out.startswith("::error file=")


def test_annotations_are_escaped() -> None:
    line = annotation("error", "100%\nof a:b,c\x1b", "a,b:c%", "x,y:z.jsonl", 3)
    assert line == "::error file=x%2Cy%3Az.jsonl,line=3,title=a%2Cb%3Ac%25::100%25%0Aof a:b,c\ufffd"


def test_github_is_a_format_of_validate_alone() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["runs", "--format", "github"])
    assert stop.value.code == 2
