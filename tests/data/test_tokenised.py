from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.aside import write_set_aside
from pipeline.data.check import load_rows
from pipeline.data.rows import Demonstration, Preference
from pipeline.data.tokenised import label_demonstrations, require_usable, tokenize_preferences
from pipeline.data.tokens import tokenize_sequences
from pipeline.errors import ExitCode, PipelineError, PipelineErrors

HI = [{"role": "user", "content": "hi"}]
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
TRIMMING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n(thinks){% endif %}"
)
PICKY = (
    "{% for message in messages %}{% if message['content'] == 'bad' %}{{ raise_exception('not that') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def pair(chosen: str, rejected: str, prompt: str = "hi") -> Preference:
    return Preference([{"role": "user", "content": prompt}], answer(chosen), answer(rejected), line=1)


def demonstration(content: str, prompt: str = "hi") -> Demonstration:
    return Demonstration([{"role": "user", "content": prompt}, *answer(content)], line=1)


# `x` and `z` are a token each. Behind the prompt stand the content, its stop token and a line break.
@pytest.mark.parametrize(
    ("room", "codes", "used"),
    [
        (22, {}, True),
        (21, {}, True),  # the line break behind the stop token
        (20, {"stop-cut": 1}, True),
        (15, {"completion-cut": 1, "stop-cut": 1}, True),
        (1, {"completion-cut": 1, "stop-cut": 1}, True),
        (0, {"nothing-in-loss": 1}, False),
        (-3, {"nothing-in-loss": 1}, False),
    ],
)
def test_what_the_cut_takes_from_a_pair(tokenizer: Any, room: int, codes: dict[str, int], used: bool) -> None:
    row = pair("x" * 20, "z" * 20)
    start = tokenize_sequences(tokenizer, row).start
    pairs, counted = tokenize_preferences(tokenizer, [row], start + room)
    assert dict(counted.codes) == codes
    assert (counted.used, counted.dropped, len(pairs)) == ((1, 0, 1) if used else (0, 1, 0))
    assert counted.truncated == (room < 22)
    assert counted.longest_whole == start + 22


@pytest.mark.parametrize(
    ("room", "codes"),
    [
        (21, {}),
        (20, {"stop-cut": 1}),
        (15, {"completion-cut": 1, "stop-cut": 1}),
        (0, {"nothing-in-loss": 1}),
    ],
)
def test_what_the_cut_takes_from_a_demonstration(tokenizer: Any, room: int, codes: dict[str, int]) -> None:
    start = tokenize_sequences(tokenizer, pair("x", "z")).start
    rows, counted = label_demonstrations(tokenizer, [demonstration("x" * 20)], start + room)
    assert dict(counted.codes) == codes
    assert len(rows) == (room > 0)


def test_a_cut_between_two_answers_loses_no_stop_token(tokenizer: Any) -> None:
    messages = [*HI, *answer("x"), *HI, *answer("z")]
    first = len(tokenizer.apply_chat_template(messages[:2], return_dict=True)["input_ids"])
    counted = label_demonstrations(tokenizer, [Demonstration(messages)], first + 2)[1]
    assert dict(counted.codes) == {"completion-cut": 1}


def test_pairs_that_the_cut_makes_equal(tokenizer: Any) -> None:
    row = pair("xxxxx", "xxxxz")
    start = tokenize_sequences(tokenizer, row).start
    assert "equal-after-cut" not in tokenize_preferences(tokenizer, [row], start + 5)[1].codes
    counted = tokenize_preferences(tokenizer, [row], start + 4)[1]
    assert counted.codes["equal-after-cut"] == counted.dropped == 1
    assert counted.errors[0].code == "equal-after-cut"


def test_pairs_that_are_the_same_tokens(tokenizer: Any) -> None:
    tokenizer.chat_template = TRIMMING
    counted = tokenize_preferences(tokenizer, [pair("x", "x ")], 64)[1]
    assert dict(counted.codes) == {"equal-tokens": 1}
    assert counted.dropped == 1


@pytest.mark.parametrize(
    ("content", "template", "code", "used"),
    [
        ("a <|im_end|> b", None, "control-token", False),
        ("a <|endoftext|> b", None, "control-token", False),  # special, though this template does not use it
        ("a [INST] b", None, "foreign-control-token", True),
        ("a [INST] b", INST, "control-token", False),  # ordinary text to the tokenizer, structure to the template
        ("a <|eot_id|> b", None, "foreign-control-token", True),
        ("a <think> b </think>", None, None, True),
        ("a < b, [x], s|", None, None, True),
    ],
)
@pytest.mark.parametrize("speaker", ["user", "assistant"])
def test_control_tokens_in_content(
    tokenizer: Any, content: str, template: str | None, code: str | None, used: bool, speaker: str
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    row = demonstration("x", content) if speaker == "user" else demonstration(content)
    rows, counted = label_demonstrations(tokenizer, [row], 128)
    assert dict(counted.codes) == ({code: 1} if code else {})
    assert len(rows) == used
    if code:
        found = (counted.errors + counted.warnings)[0]
        assert f"turn {1 if speaker == 'user' else 2} ({speaker})" in found.message
        assert found.severity == ("error" if code == "control-token" else "warning")


def test_control_tokens_of_a_tool_call_and_of_a_rejected_answer(tokenizer: Any) -> None:
    row = demonstration("x")
    assert row.messages is not None
    row.messages[1]["tool_calls"] = [{"function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}]
    assert label_demonstrations(tokenizer, [row], 128)[1].errors[0].code == "control-token"
    counted = tokenize_preferences(tokenizer, [pair("x", "z<|im_start|>")], 128)[1]
    assert "of `rejected`" in counted.errors[0].message


def test_control_tokens_of_plain_text_may_be_meant(tokenizer: Any) -> None:
    rendered = Demonstration(prompt="<|im_start|>user\nhi<|im_end|>\n", completion="x<|im_end|>")
    rows, counted = label_demonstrations(
        tokenizer, [rendered, Demonstration(prompt="hi", completion="x<|im_end|>")], 64
    )
    assert len(rows) == 2
    assert dict(counted.codes) == {"foreign-control-token": 1}


def test_prompt_that_is_no_prefix(tokenizer: Any) -> None:
    text = Preference("It works aga", " no", "in, thank you!")
    assert tokenize_preferences(tokenizer, [text], 64)[1].codes["prompt-not-prefix"] == 1
    tokenizer.chat_template = THINKING
    for counted in (
        tokenize_preferences(tokenizer, [pair("x", "z")], 64)[1],
        label_demonstrations(tokenizer, [demonstration("x")], 64)[1],
    ):
        assert dict(counted.codes) == {"prompt-not-prefix": 1}
        assert "(thinks)" in counted.warnings[0].message
        assert counted.used == 1


def test_a_template_without_a_stop_token(tokenizer: Any) -> None:
    tokenizer.chat_template = ENDLESS
    assert tokenize_preferences(tokenizer, [pair("x", "z")], 64)[1].codes["no-stop-token"] == 1


def test_a_row_that_the_template_refuses_is_named(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = PICKY
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}, *answer("x")]} for text in ("good", "bad", "good")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled, counted = label_demonstrations(tokenizer, load_rows(path, "demonstration"), 64)
    assert len(labelled) == 2
    found = counted.errors[0]
    assert (found.file, found.line, found.code) == (str(path), 2, "template-refuses")
    assert "not that" in found.message
    tokenizer.chat_template = None
    with pytest.raises(PipelineError) as caught:
        label_demonstrations(tokenizer, load_rows(path, "demonstration"), 64)
    assert caught.value.code == "no-chat-template"


def test_counts_and_shares(tokenizer: Any) -> None:
    rows = [pair("x", "z"), pair("x" * 50, "z"), pair("x", "z", prompt="y" * 99), pair("<|im_end|>", "z")]
    counted = tokenize_preferences(tokenizer, rows, 48)[1]
    found = counted.as_dict()
    assert (found["rows"], found["used"], found["dropped"], found["truncated"]) == (4, 2, 2, 2)
    assert found["truncated_percent"] == 50.0
    assert found["dropped_rows"] == [3, 4]
    assert found["findings"] == {
        "completion-cut": {"rows": 1, "percent": 25.0, "severity": "warning"},
        "stop-cut": {"rows": 1, "percent": 25.0, "severity": "warning"},
        "nothing-in-loss": {"rows": 1, "percent": 25.0, "severity": "error"},
        "control-token": {"rows": 1, "percent": 25.0, "severity": "error"},
    }
    assert "2 of 4 rows (50.0 %)" in next(iter(counted.describe()))
    json.dumps(found)


def test_the_gate(tokenizer: Any) -> None:
    rows = [pair("x", "z"), pair("x", "z", prompt="y" * 99)]
    counted = tokenize_preferences(tokenizer, rows, 48)[1]
    with pytest.raises(PipelineErrors) as caught:
        require_usable([counted], "dpo", "refuse")
    first, second = caught.value.errors
    assert (first.code, first.exit_code) == ("invalid-rows", ExitCode.WRONG)
    assert "1 of 2 rows" in first.message
    assert "--set data.on_invalid=set-aside" in first.mend
    assert "`dpo.max_length`" in first.mend
    assert second.code == "nothing-in-loss"
    require_usable([counted], "dpo", "set-aside")
    nothing = tokenize_preferences(tokenizer, rows[1:], 48)[1]
    with pytest.raises(PipelineErrors, match="no row is left"):
        require_usable([nothing], "dpo", "set-aside")


def test_wrong_rows_are_set_aside_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good, wrong = '{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": ""}'
    path.write_text(f'{good}\n{wrong}\n{{"prompt": \n{{"prompt": "a", "prompt": "c", "completion": "b"}}\n{good}\n')
    with pytest.raises(PipelineErrors):
        load_rows(path, "demonstration")
    checked = load_rows(path, "demonstration", set_aside=True)
    assert [row.line for row in checked.rows] == [1, 5]
    assert [(row.line, row.codes) for row in checked.set_aside] == [
        (2, ["empty-content"]),
        (3, ["invalid-json"]),
        (4, ["duplicate-key"]),
    ]
    written = write_set_aside(tmp_path, checked.set_aside)
    assert written == tmp_path / "set-aside.jsonl"
    kept = [json.loads(line) for line in written.read_text().splitlines()]
    assert kept[0]["row"] == json.loads(wrong)
    assert kept[0]["file"] == str(path)
    assert kept[0]["reasons"][0]["code"] == "empty-content"
    assert kept[1]["row"] == '{"prompt": '
    assert kept[2]["row"] == '{"prompt": "a", "prompt": "c", "completion": "b"}'  # both keys, which JSON would lose
    assert write_set_aside(tmp_path / "other", []) is None


def test_rows_of_an_array_are_pointed_to_and_a_broken_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    good = {"prompt": "a", "completion": "b"}
    path.write_text(json.dumps([{"prompt": "a", "completion": ""}, good]))
    checked = load_rows(path, "demonstration", set_aside=True)
    assert checked.pointers == ["/1"]
    assert checked.set_aside[0].pointer == "/0"
    path.write_text(f"[{json.dumps(good)}, {{]")  # what follows cannot be told apart: it would be lost in silence
    with pytest.raises(PipelineErrors):
        load_rows(path, "demonstration", set_aside=True)
