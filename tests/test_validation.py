"""`pipeline validate EXPERIMENT`: every file that it names, as its stages would read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.data.check import load_rows
from pipeline.errors import PipelineErrors
from pipeline.experiment_file import load_experiment
from pipeline.validation import require_experiment_data, validate

GOOD = [{"prompt": f"Question {number}", "completion": "Yes"} for number in range(12)]
BAD = {"prompt": "Question", "completion": ""}


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def data(train: str, eval: str | None = None, aside: bool = True, **more: Any) -> dict[str, Any]:
    split = {"train": train, **({} if eval is None else {"eval": eval}), **more}
    return {"demonstrations": split, "preferences": None, "on_invalid": "set-aside" if aside else "refuse"}


def answer(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["validate", "--no-tokens", "--format", "json", str(path)])
    return code, json.loads(capsys.readouterr().out)


def test_rows_that_would_be_set_aside_are_told_and_are_no_failure(
    write_experiment: Any, rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train = rows("train.jsonl", [*GOOD, BAD, {}, "{\n"])
    named = data(train)
    code, said = answer(write_experiment(data=named, evaluation={"prompts": None}), capsys)
    assert (code, said["ok"], said["rows"], said["valid"], said["set_aside"]) == (0, True, 15, 12, 3)
    found = [(one["line"], one["code"], one["severity"]) for one in said["warnings"]]
    wrong = [(13, "empty-content"), (14, "unknown-shape"), (15, "invalid-json")]
    assert found == [(*one, "warning") for one in wrong]
    assert (said["errors"], said["error_count"]) == ([], 0)
    assert len(load_rows(Path(train), "demonstration", set_aside=True).set_aside) == 3
    assert main(["validate", "--no-tokens", str(write_experiment(data=named, evaluation={"prompts": None}))]) == 0
    assert "15 rows, 3 of them would be set aside" in capsys.readouterr().out


REFUSED = {
    "no row is left": ("train.jsonl", [BAD, {}]),
    "rows cannot be told apart": ("train.json", ["[" + json.dumps(GOOD[0]) + ', {"prompt"']),
    "a column is missing": ("train.jsonl", GOOD),
}


@pytest.mark.parametrize(("name", "content"), REFUSED.values(), ids=REFUSED)
def test_what_training_would_refuse_fails_under_set_aside_too(
    write_experiment: Any, rows: Any, capsys: pytest.CaptureFixture[str], name: str, content: list[Any]
) -> None:
    more = {"map": {"notes": "system"}} if content is GOOD else {}
    path = write_experiment(data=data(rows(name, content), **more), evaluation={"prompts": None})
    code, said = answer(path, capsys)
    assert (code, said["ok"], said["set_aside"]) == (1, False, 0)
    if name != "train.jsonl" or content is GOOD:  # that no row is left is said once they are tokenised
        with pytest.raises(PipelineErrors):
            require_experiment_data(load_experiment(path).experiment)


def test_questions_of_the_comparison_are_never_set_aside(
    write_experiment: Any, rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held = rows("train.jsonl", [*GOOD, BAD]), rows("held.jsonl", [{"prompt": "x", "completion": "y"}, BAD])
    code, said = answer(write_experiment(data=data(train, held), evaluation={"prompts": held}), capsys)
    assert (code, said["set_aside"]) == (1, 1)
    assert [(Path(one["file"]).name, one["line"]) for one in said["errors"]] == [("held.jsonl", 2)]


def test_refusing_stays_the_default(write_experiment: Any, rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_experiment(data=data(rows("train.jsonl", [*GOOD, BAD]), aside=False), evaluation={"prompts": None})
    code, said = answer(path, capsys)
    assert (code, said["error_count"], said["set_aside"]) == (1, 1, 0)


def test_a_shard_without_a_right_row_is_set_aside_whole(
    write_experiment: Any, rows: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows("shards/1.jsonl", GOOD)
    rows("shards/2.jsonl", [BAD])
    path = write_experiment(data=data(str(tmp_path / "shards")), evaluation={"prompts": None})
    code, said = answer(path, capsys)
    assert (code, said["valid"], said["set_aside"]) == (0, 12, 1)


def test_columns_of_an_experiment(write_experiment: Any, rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`map` serves both files of its split, and the same file where it is asked in the comparison."""
    own = [{"q": row["prompt"], "a": row["completion"]} for row in GOOD]
    train, held = rows("train.jsonl", own), rows("held.jsonl", [{"q": "What?", "a": "That"}, {"q": "x", "a": 1}])
    path = write_experiment(
        data=data(train, held, aside=False, map={"q": "prompt", "a": "completion"}), evaluation={"prompts": held}
    )
    code, said = answer(path, capsys)
    assert (code, said["valid"]) == (1, 13)
    assert [(one["line"], one["pointer"], one["code"]) for one in said["errors"]] == [(2, "/a", "wrong-type")]
    with pytest.raises(PipelineErrors) as refused:
        require_experiment_data(load_experiment(path).experiment)
    assert {error.pointer for error in refused.value.errors} == {None, "/a"}


@pytest.mark.parametrize(
    ("columns", "code", "mend"),
    [
        ({"q": "promt"}, "unknown-value", "did you mean `prompt`?"),
        ({"q": "prompt", "p": "prompt"}, "conflict", "keep one of the two"),
        ({"q": None}, "wrong-type", "give it a value, or remove the line"),
    ],
)
def test_columns_that_are_no_map(write_experiment: Any, rows: Any, columns: Any, code: str, mend: str) -> None:
    with pytest.raises(PipelineErrors) as refused:
        load_experiment(write_experiment(data=data(rows("a.jsonl", GOOD), map=columns)))
    error = refused.value.errors[0]
    assert (error.code, error.mend, error.pointer) == (code, mend, "/data/demonstrations/map/q")
    assert error.line is not None


def test_columns_are_set_on_the_command_line(write_experiment: Any, rows: Any) -> None:
    path = write_experiment(data=data(rows("a.jsonl", GOOD)))
    experiment = load_experiment(path, ["data.demonstrations.map.q=prompt"]).experiment
    assert experiment.data.demonstrations is not None
    assert experiment.data.demonstrations.map == {"q": "prompt"}


def test_copies_between_training_and_evaluation(write_experiment: Any, rows: Any) -> None:
    train, held = rows("train.jsonl", GOOD), rows("held.jsonl", [{"prompt": "x", "completion": "y"}, GOOD[3]])
    reports = validate([write_experiment(data=data(train, held), evaluation={"prompts": None})], tokens=False)
    found = [(one.line, one.code, one.message) for one in reports[1].warnings if one.code != "few-rows"]
    assert found == [(2, "duplicate-across-files", f"the same row is trained on at {train}:4")]
