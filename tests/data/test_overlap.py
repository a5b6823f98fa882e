"""Rows and prompts in more than one file: which pairs are warned of, and where."""

import json

import pytest

from pipeline.data.check import check_file
from pipeline.data.overlap import CheckedFile, Use, warn_of_overlap

TRAIN, EVAL = Use("sft", trains=True), Use("sft", trains=False)
DPO_TRAIN, DPO_EVAL, PROMPTS = Use("dpo", trains=True), Use("dpo", trains=False), Use("evaluation", trains=False)
CODES = ("evaluated-on-training-data", "shared-prompts", "duplicate-across-files")


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def file(tmp_path):
    def file(name, rows, *uses):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return CheckedFile(check_file(path), list(uses))

    return file


def text(prompt, completion="x"):
    return {"prompt": prompt, "completion": completion}


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
    held = file("eval.jsonl", [text("x"), text("B "), text("a", "y"), text("y")], EVAL)
    warn_of_overlap([train, held], 100)
    assert warned(train) == []
    assert warned(held) == [(2, "evaluated-on-training-data"), (3, "evaluated-on-training-data")]
    assert held.report.warnings[-1].message == f"the prompt is trained on at {train.report.file}:1"
    assert held.report.audit["overlap"] == [{"file": train.report.file, "rows": 2, "same_rows": 0}]


def test_a_whole_row_that_is_trained_on_and_evaluated_on(file):
    train = file("train.jsonl", [text("a"), text("b"), text("c")], TRAIN)
    held = file("eval.jsonl", [text("x"), text("c"), text("a", "y"), text("b")], EVAL)
    warn_of_overlap([train, held], 100)
    assert warned(held) == [(2, CODES[2]), (3, CODES[0]), (4, CODES[2])]
    said = [one.message for one in held.report.warnings if one.code == CODES[2]]
    assert said == [f"the same row is trained on at {train.report.file}:{line}" for line in (3, 2)]
    assert held.report.audit["overlap"] == [{"file": train.report.file, "rows": 3, "same_rows": 2}]


def test_a_row_that_is_nearly_one_that_is_trained_on(tmp_path):
    words = " ".join(f"w{number}" for number in range(30))
    files = []
    for name, rows, use in (
        ("train.jsonl", [text("x y z"), text(f"{words} a")], TRAIN),
        ("eval.jsonl", [text(f"{words} b"), text(f"{words} a", "y"), text("p q r")], EVAL),
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(CheckedFile(check_file(tmp_path / name, near=True), [use]))
    warn_of_overlap(files, 100)
    found = {one.line: one for one in files[1].report.warnings if one.code in (*CODES, "near-duplicate-across-files")}
    assert {line: one.code for line, one in found.items()} == {1: "near-duplicate-across-files", 2: CODES[0]}
    # 31 words and the answer are 30 runs of three; the last two hold the word that differs: 28 of 32 are in both.
    assert found[1].message == f"88% the same as the row that is trained on at {files[0].report.file}:2"


def test_rows_of_an_array_on_one_line_are_told_apart(file, tmp_path):
    train = file("train.jsonl", [text("a"), text("b")], TRAIN)
    (tmp_path / "eval.json").write_text(json.dumps([text("b"), text("x"), text("a")]))
    held = CheckedFile(check_file(tmp_path / "eval.json"), [EVAL])
    warn_of_overlap([train, held], 100)
    assert [one.pointer for one in held.report.warnings if one.code == CODES[2]] == ["/0", "/2"]
    assert held.report.audit["overlap"][0]["same_rows"] == 2


def test_rows_with_other_trained_turns_are_not_the_same(file):
    def talk(*weights):
        turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
        for turn, weight in zip(turns[1::2], weights, strict=True):
            turn["weight"] = weight
        return {"messages": turns}

    train = file("train.jsonl", [talk(1, 0), talk(0, 1), talk(1, 1), talk(0, 1)], TRAIN)
    assert train.report.audit["duplicate_rows"] == 1
    first, second = file("one.jsonl", [text("a")], EVAL), file("two.jsonl", [talk(0, 1)], EVAL)
    warn_of_overlap([file("last.jsonl", [talk(0, 1)], TRAIN), first, second], 100)
    assert (warned(first), warned(second)) == ([], [(1, CODES[2])])


def test_the_evaluated_file_is_warned_of_whichever_comes_first(file):
    held, train = file("eval.jsonl", [text("a", "y")], EVAL), file("train.jsonl", [text("a")], TRAIN)
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
    one = file("one.jsonl", [text("z"), text("a"), text("b"), text("c")])
    two = file("two.jsonl", [text("q"), text("a", "y"), text("b", "y"), text("c")])
    warn_of_overlap([one, two], 100)
    assert warned(two) == [(4, "duplicate-across-files"), (2, "shared-prompts")]
    said = [warning.message for warning in two.report.warnings[-2:]]
    assert said == [
        f"1 row stands in another file as well, this one at {one.report.file}:4",
        f"2 rows have a prompt of {one.report.file}, this one that of its line 2",
    ]
    assert two.report.audit["overlap"] == [{"file": one.report.file, "rows": 3, "same_rows": 1}]


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
    other = {"messages": [*talk["messages"][:3], message("assistant", "e")]}
    train, held = file("train.jsonl", [talk], TRAIN), file("eval.jsonl", [other, other, other], EVAL)
    warn_of_overlap([train, held], 2)
    assert held.report.warning_counts["evaluated-on-training-data"] == 3
    assert held.report.audit["overlap"][0]["rows"] == 3


def test_of_shards_of_one_data_set_only_whole_rows_are_compared(file):
    rows = [[text("a"), text("b")], [text("a", "y"), text("c")], [text("c"), text("d"), text("b")]]
    shards = [file(f"{number}.jsonl", some, TRAIN) for number, some in enumerate(rows)]
    held = file("eval.jsonl", [text("a", "z")], EVAL)
    for shard in shards:
        shard.name = "shards/"
    warn_of_overlap([*shards, held], 100)
    assert [warned(one) for one in (*shards, held)] == [[], [], [(1, CODES[2])], [(1, CODES[0])] * 2]
    said = f"2 rows stand in another file as well, this one at {shards[1].report.file}:2"
    assert shards[2].report.warnings[-1].message == said
