from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import token_check
from pipeline.data.check import check_file
from pipeline.experiment_file import load_experiment
from pipeline.token_check import add_tokens, token_reports


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Row 2 holds a control token, row 3's prompt fills 128 tokens."""
    file = tmp_path / "bad.jsonl"
    prompts = ["hi", "hi <|im_end|>", "x" * 200]
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]}
        for prompt in prompts
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def experiment(write_experiment: Any, **changes: Any) -> Any:
    return load_experiment(write_experiment(**changes)).experiment


def test_in_a_process_without_torch(write_experiment: Any, bad: Path) -> None:
    given = experiment(write_experiment, data={"demonstrations": {"train": str(bad)}})
    report = check_file(bad, "demonstration")
    assert (report.ok, report.valid) == (True, 3)
    add_tokens([report], given, 100, None)
    assert [(error.line, error.code) for error in report.errors] == [(2, "control-token"), (3, "nothing-in-loss")]
    assert (report.ok, report.valid, report.error_count) == (False, 1, 2)
    assert report.as_dict()["tokens"]["findings"]["nothing-in-loss"]["percent"] == 33.33
    assert report.as_dict()["tokens"]["stage"] == "sft"


def test_reports_are_those_of_this_process(write_experiment: Any, bad: Path) -> None:
    given = experiment(write_experiment, data={"demonstrations": {"train": str(bad)}})
    assert token_check._ask(given) == token_reports(given)


def test_shards_have_a_report_each(write_experiment: Any, bad: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards = [tmp_path / "shards" / name for name in ("1.jsonl", "2.jsonl")]
    for shard in shards:
        shard.write_bytes(bad.read_bytes())
    given = experiment(write_experiment, data={"demonstrations": {"train": str(tmp_path / "shards")}})
    assert [(one.file, one.dropped) for one in token_reports(given)][:2] == [(str(shard), 2) for shard in shards]


@pytest.mark.parametrize("model", ["someone/some-model", "./nowhere"])
def test_a_tokenizer_that_is_not_at_hand(write_experiment: Any, bad: Path, model: str) -> None:
    report = check_file(bad, "demonstration")
    add_tokens([report], experiment(write_experiment, model={"id": model}), 100, None)
    assert report.ok
    assert [warning.code for warning in report.warnings if warning.code != "few-rows"] == ["not-tokenised"]


def test_a_tokenizer_without_a_template(write_experiment: Any, bad: Path, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").unlink()
    given = experiment(write_experiment, model={"id": str(folder)}, data={"demonstrations": {"train": str(bad)}})
    report = check_file(bad, "demonstration")
    add_tokens([report], given, 100, None)
    assert [error.code for error in report.errors] == ["no-chat-template"]


def test_not_asked_or_too_much(write_experiment: Any, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_check, "_ask", lambda _: pytest.fail("tokenised"))
    given = experiment(write_experiment)
    report = check_file(bad, "demonstration")
    add_tokens([report], given, 100, False)
    monkeypatch.setattr(token_check, "MAX_BYTES", 10)
    add_tokens([report], given, 100, None)
    assert report.warning_counts["not-tokenised"] == 1
