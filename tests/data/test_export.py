import json

import pytest

from pipeline.cli import main
from pipeline.data.check import load_rows
from pipeline.data.export import export
from pipeline.errors import ExitCode, PipelineError

PAIR = {"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5"}
CANONICAL = {
    "prompt": [{"role": "user", "content": "Add.\n2 and 2"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}
USER, ANSWER = {"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.json"
    path.write_text(json.dumps([PAIR, {**PAIR, "chosen": ""}]))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_wrong_rows_are_refused_or_left_out_and_counted(tmp_path, source):
    out = tmp_path / "out.jsonl"
    with pytest.raises(PipelineError, match="1 of 2 rows") as caught:
        export(source, "preference", out)
    assert caught.value.exit_code == ExitCode.WRONG
    assert not out.exists()
    written = export(source, "preference", out, skip_invalid=True)
    assert (written.rows, written.skipped) == (1, 1)
    assert rows_of(out) == [CANONICAL]


def test_a_file_is_overwritten_only_when_asked(tmp_path, source):
    source.write_text(json.dumps([PAIR]))
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(PipelineError) as caught:
        export(source, "preference", out)
    assert (caught.value.code, out.read_text()) == ("file-exists", "mine")
    export(source, "preference", out, force=True)
    assert rows_of(out) == [CANONICAL]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.jsonl"]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", {"prompt": "a", "completion": "b"}),
        ("demonstration", {"messages": [USER, ANSWER], "tools": [{"name": "now"}]}),
        ("demonstration", {"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}),
        ("demonstration", {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}),
        ("preference", CANONICAL),
        ("preference", {"prompt": "a ", "chosen": "b", "rejected": "c"}),
    ],
)
def test_what_is_written_is_read_back_as_the_same(tmp_path, kind, row):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(row))
    export(source, kind, out)
    assert rows_of(out) == [row]
    assert load_rows(out, kind).rows == load_rows(source, kind).rows


def test_nothing_is_written_of_nothing_but_wrong_rows(tmp_path, source):
    source.write_text(json.dumps([{**PAIR, "chosen": ""}]))
    with pytest.raises(PipelineError, match="every row is wrong"):
        export(source, "preference", tmp_path / "out.jsonl", skip_invalid=True)
    with pytest.raises(PipelineError, match="no such folder"):
        export(source, "preference", tmp_path / "none" / "out.jsonl")


def test_the_command(tmp_path, capsys):
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("q,a\nWhy?,Because\n")
    argv = ["convert", str(source), str(out), "--to", "demonstration", "--map", "q=prompt", "--map", "a=completion"]
    assert main([*argv, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ok": True,
        "path": str(out),
        "rows": 1,
        "skipped": 0,
        "format": "standard-prompt-completion",
        "kind": "demonstration",
    }
    assert rows_of(out) == [{"prompt": "Why?", "completion": "Because"}]
    assert main(argv) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(["validate", str(source), "--map", "q=prompt", "--map", "a=completion"]) == 0
    assert main(["validate", str(source), "--map", "q=prompt", "--map", "b=completion"]) == 1
