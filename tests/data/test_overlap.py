"""Prompts in more than one file: which pairs are warned of, and where."""

import json

import pytest

from pipeline.data.check import check_file
from pipeline.data.overlap import CheckedFile, Use, warn_of_overlap

TRAIN, EVAL = Use("sft", trains=True), Use("sft", trains=False)
DPO_TRAIN, DPO_EVAL, PROMPTS = Use("dpo", trains=True), Use("dpo", trains=False), Use("evaluation", trains=False)
CODES = ("evaluated-on-training-data", "shared-prompts")


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def file(tmp_path):
    def file(name, rows, *uses):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return CheckedFile(check_file(path), list(uses))

    return file


def text(prompt):
    return {"prompt": prompt, "completion": "x"}


def pair(prompt):
    return {
        "prompt": [message("user", prompt)],
        "chosen": [message("assistant", "b")],
        "rejected": [message("assistant", "c")],
    }


def warned(file):
    return [(one.line, one.code) for one in file.report.warnings if one.code in CODES]


def test_every_evaluated_row_that_is_trained_on(file):
    train = file("train.jsonl", [text("a"), text("b"), text("c")], TRAIN)
    held = file("eval.jsonl", [text("x"), text("B "), text("a"), text("y")], EVAL)
    warn_of_overlap([train, held], 100)
    assert warned(train) == []
    assert warned(held) == [(2, "evaluated-on-training-data"), (3, "evaluated-on-training-data")]
    assert held.report.warnings[-1].message == f"the prompt is trained on at {train.report.file}:1"
    assert held.report.audit["overlap"] == [{"file": train.report.file, "rows": 2}]


def test_the_evaluated_file_is_warned_of_whichever_comes_first(file):
    held, train = file("eval.jsonl", [text("a")], EVAL), file("train.jsonl", [text("a")], TRAIN)
    warn_of_overlap([held, train], 100)
    assert (warned(held), warned(train)) == ([(1, "evaluated-on-training-data")], [])


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (TRAIN, DPO_EVAL, "evaluated-on-training-data"),
        (TRAIN, PROMPTS, "evaluated-on-training-data"),
        (DPO_TRAIN, PROMPTS, "evaluated-on-training-data"),
        (DPO_TRAIN, EVAL, "evaluated-on-training-data"),
        (TRAIN, DPO_TRAIN, "shared-prompts"),
        (EVAL, PROMPTS, None),
        (DPO_EVAL, EVAL, None),
    ],
)
def test_stages(file, first, second, code):
    files = [file("one.jsonl", [text("a"), text("b")], first), file("two.jsonl", [pair("b"), pair("A")], second)]
    warn_of_overlap(files, 100)
    expected = [] if code is None else [(1, code), (2, code)] if code == CODES[0] else [(1, code)]
    assert warned(files[1]) == expected
    assert warned(files[0]) == []


def test_files_of_unknown_use_get_one_warning_with_both_places(file):
    files = [file("one.jsonl", [text("z"), text("a"), text("b")]), file("two.jsonl", [text("q"), text("a"), text("b")])]
    warn_of_overlap(files, 100)
    assert warned(files[1]) == [(2, "shared-prompts")]
    said = files[1].report.warnings[-1].message
    assert said == f"2 rows have a prompt of {files[0].report.file}, this one that of its line 2"


def test_a_file_that_is_trained_on_and_evaluated_on(file):
    one = file("one.jsonl", [text("a")], TRAIN, EVAL)
    warn_of_overlap([one], 100)
    assert warned(one) == [(None, "evaluated-on-training-data")]


def test_what_is_a_prompt_of_a_conversation(file):
    """Whatever comes before an answer that is trained on, but for the system's turns."""
    turns = [message("system", "s"), message("user", "a"), message("assistant", "b"), message("user", "c")]
    train = file("train.jsonl", [{"messages": [*turns, message("assistant", "d")]}], TRAIN)
    first, second = [message("user", "a")], [message("user", "a"), message("assistant", "B"), message("user", "c")]
    answer = [message("assistant", "x")]
    rows = [
        {"prompt": first, "completion": answer},
        {"prompt": second, "completion": answer},
        {"prompt": [message("user", "c")], "completion": answer},
        {"prompt": [message("system", "t"), *first], "completion": answer},
    ]
    held = file("eval.jsonl", rows, EVAL)
    warn_of_overlap([train, held], 100)
    assert [line for line, _ in warned(held)] == [1, 2, 4]


def test_earlier_turns_that_are_not_trained_on_are_no_prompts(file):
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    train = file("train.jsonl", [{"prompt": turns, "completion": [message("assistant", "d")]}], TRAIN)
    held = file("eval.jsonl", [text("a")], EVAL)
    warn_of_overlap([train, held], 100)
    assert warned(held) == []


def test_a_row_is_warned_of_once_and_all_are_counted(file):
    talk = {
        "messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    }
    train, held = file("train.jsonl", [talk], TRAIN), file("eval.jsonl", [talk, talk, talk], EVAL)
    warn_of_overlap([train, held], 2)
    assert held.report.warning_counts["evaluated-on-training-data"] == 3
    assert held.report.audit["overlap"][0]["rows"] == 3


def test_shards_of_one_data_set_are_not_compared(file):
    shards = [file("one.jsonl", [text("a")], TRAIN), file("two.jsonl", [text("a")], TRAIN)]
    held = file("eval.jsonl", [text("a")], EVAL)
    for shard in shards:
        shard.name = "shards/"
    warn_of_overlap([*shards, held], 100)
    assert [warned(one) for one in (*shards, held)] == [[], [], [(1, CODES[0])] * 2]
