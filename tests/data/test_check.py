"""Each broken file gives exactly the errors that it has, at the places where they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.check import check_file, load_rows
from pipeline.data.codes import MENDS
from pipeline.data.place import MAX_FINDINGS_PER_ROW
from pipeline.data.read import MAX_ROW_BYTES
from pipeline.data.rows import Demonstration, Preference
from pipeline.errors import ExitCode, PipelineError, PipelineErrors

USER = '{"role": "user", "content": "Hi"}'
ANSWER = '{"role": "assistant", "content": "Hello"}'
SYSTEM = '{"role": "system", "content": "Be kind"}'
CALL = '{"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}'
RESULT = '{"role": "tool", "content": "noon"}'
GOOD = '{"prompt": "a", "completion": "b"}'
GOOD_PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


def talk(*turns):
    return '{"messages": [' + ", ".join(turns) + "]}"


def pair(prompt=f"[{USER}]", chosen=f"[{ANSWER}]", rejected='[{"role": "assistant", "content": "Go"}]'):
    return f'{{"prompt": {prompt}, "chosen": {chosen}, "rejected": {rejected}}}'


# One broken row after a good one in JSONL: the errors stand on line 2, each as (pointer, code).
DEMONSTRATIONS = {
    # The text
    "cut off": ('{"prompt": "a", "comp', [(None, "invalid-json")]),
    "comma missing": ('{"prompt": "a" "completion": "b"}', [(None, "invalid-json")]),
    "comma too many": ('{"prompt": "a", "completion": "b",}', [(None, "invalid-json")]),
    "Python's repr": ("{'prompt': 'a', 'completion': 'b'}", [(None, "invalid-json")]),
    "two rows on a line": (GOOD + GOOD, [(None, "invalid-json")]),
    "tab in a string": ('{"prompt": "a\tb", "completion": "c"}', [(None, "invalid-json")]),
    "Latin-1": ('{"prompt": "é", "completion": "b"}'.encode("latin-1"), [(None, "broken-utf-8")]),
    "surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}', [(None, "broken-utf-8")]),
    "NUL byte": ('{"prompt": "a\0", "completion": "b"}', [(None, "nul-character")]),
    "NUL escaped": ('{"prompt": "a\\u0000", "completion": "b"}', [("/prompt", "nul-character")]),
    "half an emoji": ('{"prompt": "a", "completion": "\\ud83d"}', [("/completion", "unpaired-surrogate")]),
    "halves swapped": (
        '{"prompt": "a", "completion": "\\udc4d\\ud83d"}',
        [("/completion", "unpaired-surrogate")],
    ),
    "half without its first": ('{"prompt": "a", "completion": "\\uDFFF"}', [("/completion", "unpaired-surrogate")]),
    "surrogate in a key": (
        '{"prompt": "a", "completion": "b", "\\ud83d": 1}',
        [("/\\ud83d", "unpaired-surrogate")],
    ),
    "NaN": ('{"prompt": "a", "completion": "b", "score": NaN}', [("/score", "not-a-number")]),
    "minus infinity": ('{"prompt": "a", "completion": -Infinity}', [("/completion", "not-a-number")]),
    "duplicate key": ('{"prompt": "a", "prompt": "b", "completion": "c"}', [("/prompt", "duplicate-key")]),
    "duplicate key inside": (
        talk('{"role": "user", "content": "a", "content": "b"}', ANSWER),
        [("/messages/0/content", "duplicate-key")],
    ),
    "integer of 65 bits": (
        '{"prompt": "a", "completion": "b", "id": 18446744073709551616}',
        [("/id", "number-out-of-range")],
    ),
    "integer below 64 bits": (
        '{"prompt": "a", "completion": "b", "id": -9223372036854775809}',
        [("/id", "number-out-of-range")],
    ),
    "integer of 5,000 digits": (
        '{"prompt": "a", "completion": "b", "id": ' + "9" * 5000 + "}",
        [("/id", "number-out-of-range")],
    ),
    "float that overflows": (
        '{"prompt": "a", "completion": "b", "x": 1e999}',
        [("/x", "number-out-of-range")],
    ),
    "65 levels": (
        '{"prompt": "a", "completion": "b", "x": ' + "[" * 64 + "]" * 64 + "}",
        [("/x" + "/0" * 63, "nesting-too-deep")],
    ),
    "100,000 levels": ('{"x": ' + "[" * 100_000, [(None, "nesting-too-deep")]),
    "mark in a later line": ("\ufeff" + GOOD, [(None, "byte-order-mark")]),
    # The shape
    "number": ("1", [("", "not-an-object")]),
    "list": ("[]", [("", "not-an-object")]),
    "null": ("null", [("", "not-an-object")]),
    "empty object": ("{}", [("", "unknown-shape")]),
    "other keys": ('{"title": "a", "body": "b"}', [("", "unknown-shape")]),
    "preference": (GOOD_PAIR, [("", "wrong-kind")]),
    "both forms": (f'{{"prompt": "a", "completion": "b", "messages": [{USER}]}}', [("", "ambiguous-form")]),
    "no completion": ('{"prompt": "a"}', [("", "missing-key")]),
    "completion is null": ('{"prompt": "a", "completion": null}', [("/completion", "wrong-type")]),
    "prompt is a number": ('{"prompt": 1, "completion": "b"}', [("/prompt", "wrong-type")]),
    "text and messages": (f'{{"prompt": "a", "completion": [{ANSWER}]}}', [("/completion", "mixed-forms")]),
    "messages and text": (f'{{"prompt": [{USER}], "completion": "b"}}', [("/prompt", "mixed-forms")]),
    "empty completion": ('{"prompt": "a", "completion": ""}', [("/completion", "empty-content")]),
    "blank prompt": ('{"prompt": " \\n\\u00a0", "completion": "b"}', [("/prompt", "empty-content")]),
    "prompt in front of the completion": (
        '{"prompt": "Two and two?", "completion": "Two and two? Four"}',
        [("/completion", "completion-repeats-prompt")],
    ),
    "invisible completion": (
        '{"prompt": "a", "completion": "\\u200b\\ufeff"}',
        [("/completion", "empty-content")],
    ),
    "messages is text": ('{"messages": "Hi"}', [("/messages", "wrong-type")]),
    "messages is null": ('{"messages": null}', [("/messages", "wrong-type")]),
    "no messages": ('{"messages": []}', [("/messages", "no-messages")]),
    "message is text": (talk('"Hi"', ANSWER), [("/messages/0", "wrong-type")]),
    "message is null": (talk(USER, "null"), [("/messages/1", "wrong-type")]),
    "no role": (talk('{"content": "Hi"}', ANSWER), [("/messages/0", "missing-key")]),
    "role is null": (talk('{"role": null, "content": "Hi"}', ANSWER), [("/messages/0/role", "wrong-type")]),
    "role of ShareGPT": (
        talk('{"role": "human", "content": "Hi"}', ANSWER),
        [("/messages/0/role", "unknown-role")],
    ),
    "role in capitals": (
        talk(USER, '{"role": "Assistant", "content": "x"}'),
        [("/messages/1/role", "unknown-role")],
    ),
    "no content": (talk('{"role": "user"}', ANSWER), [("/messages/0", "missing-key")]),
    "neither": (talk(USER, "{}"), [("/messages/1", "missing-key"), ("/messages/1", "missing-key")]),
    "content is null": (
        talk(USER, '{"role": "assistant", "content": null}'),
        [("/messages/1/content", "empty-content")],
    ),
    "content is empty": (
        talk('{"role": "user", "content": ""}', ANSWER),
        [("/messages/0/content", "empty-content")],
    ),
    "content is an object": (
        talk('{"role": "user", "content": {}}', ANSWER),
        [("/messages/0/content", "wrong-type")],
    ),
    "content has no parts": (
        talk('{"role": "user", "content": []}', ANSWER),
        [("/messages/0/content", "empty-content")],
    ),
    "content has blank parts": (
        talk('{"role": "user", "content": [{"type": "text", "text": " "}]}', ANSWER),
        [("/messages/0/content", "empty-content")],
    ),
    "image part": (
        talk('{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}', ANSWER),
        [("/messages/0/content/1/type", "unsupported-part")],
    ),
    "part without text": (
        talk('{"role": "user", "content": [{"type": "text"}]}', ANSWER),
        [("/messages/0/content/0", "missing-key")],
    ),
    "part is text": (
        talk('{"role": "user", "content": ["x"]}', ANSWER),
        [("/messages/0/content/0", "wrong-type")],
    ),
    "images beside messages": (
        '{"images": ["cat.png"], ' + talk(USER, ANSWER)[1:],
        [("/images", "unsupported-media")],
    ),
    "call without function": (
        talk(USER, '{"role": "assistant", "tool_calls": [{"name": "now"}]}'),
        [("/messages/1/tool_calls/0", "missing-key")],
    ),
    "arguments as text": (
        talk(USER, CALL.replace("{}", '"now"')),
        [("/messages/1/tool_calls/0/function/arguments", "invalid-arguments")],
    ),
    "type of a call": (
        talk(USER, CALL.replace('{"function"', '{"type": "custom", "function"')),
        [("/messages/1/tool_calls/0/type", "invalid-value")],
    ),
    "call without calls": (
        talk(USER, '{"role": "assistant", "tool_calls": []}'),
        [("/messages/1", "missing-key")],
    ),
    "tools is no list": ('{"tools": "{}", ' + talk(USER, ANSWER)[1:], [("/tools", "invalid-tools")]),
    "tools is no JSON": ('{"tools": "now()", ' + talk(USER, ANSWER)[1:], [("/tools", "invalid-tools")]),
    "tools is a number": ('{"tools": 1, ' + talk(USER, ANSWER)[1:], [("/tools", "wrong-type")]),
    "tool is text": ('{"tools": ["now"], ' + talk(USER, ANSWER)[1:], [("/tools/0", "wrong-type")]),
    # The conversation
    "no assistant": (talk(SYSTEM, USER), [("/messages", "no-assistant-turn")]),
    "user last": (talk(USER, ANSWER, USER), [("/messages/2/role", "last-not-assistant")]),
    "system later": (talk(USER, SYSTEM, ANSWER), [("/messages/1/role", "system-not-first")]),
    "system twice": (talk(SYSTEM, SYSTEM, USER, ANSWER), [("/messages/1/role", "system-not-first")]),
    "assistant first": (talk(ANSWER), [("/messages/0/role", "first-not-user")]),
    "assistant after system": (talk(SYSTEM, ANSWER), [("/messages/1/role", "first-not-user")]),
    "user twice": (talk(USER, USER, ANSWER), [("/messages/1/role", "roles-not-alternating")]),
    "assistant twice": (talk(USER, ANSWER, ANSWER), [("/messages/2/role", "roles-not-alternating")]),
    "result without call": (talk(USER, RESULT, ANSWER), [("/messages/1/role", "stray-tool-result")]),
    "prompt ends with assistant": (
        f'{{"prompt": [{USER}, {ANSWER}], "completion": [{ANSWER}]}}',
        [("/prompt/1/role", "prompt-last-not-user")],
    ),
    "prompt is system alone": (
        f'{{"prompt": [{SYSTEM}], "completion": [{ANSWER}]}}',
        [("/prompt/0/role", "prompt-last-not-user")],
    ),
    "completion begins with user": (
        f'{{"prompt": [{USER}], "completion": [{USER}, {ANSWER}]}}',
        [("/completion/0/role", "first-not-assistant")],
    ),
    "completion is the user's": (
        f'{{"prompt": [{USER}], "completion": [{USER}]}}',
        [("/completion/0/role", "first-not-assistant")],
    ),
    "system in a completion": (
        f'{{"prompt": [{USER}], "completion": [{ANSWER}, {SYSTEM}, {USER}, {ANSWER}]}}',
        [("/completion/1/role", "system-not-first")],
    ),
    "completion ends with user": (
        f'{{"prompt": [{USER}], "completion": [{ANSWER}, {USER}]}}',
        [("/completion/1/role", "last-not-assistant")],
    ),
    # Several at once, in the order in which they stand
    "three at once": (
        talk('{"role": "bot", "content": 1}', '{"role": "user", "value": "x"}'),
        [
            ("/messages/0/role", "unknown-role"),
            ("/messages/0/content", "wrong-type"),
            ("/messages/1", "missing-key"),
        ],
    ),
    "text and shape": (
        '{"prompt": 1, "completion": "b", "x": NaN}',
        [("/prompt", "wrong-type"), ("/x", "not-a-number")],
    ),
    "key with a slash": ('{"prompt": "a", "completion": "b", "x/y~z": NaN}', [("/x~1y~0z", "not-a-number")]),
}
PREFERENCES = {
    "demonstration": (GOOD, [("", "wrong-kind")]),
    "no prompt": ('{"chosen": "b", "rejected": "c"}', [("/rejected", "no-common-prompt")]),
    "no rejected": ('{"prompt": "a", "chosen": "b"}', [("", "missing-key")]),
    "chosen with its prompt in front": (
        '{"prompt": "Two and two?", "chosen": "Two and two? Four", "rejected": "Five"}',
        [("/chosen", "completion-repeats-prompt")],
    ),
    "both with their prompt in front": (
        '{"prompt": " Two and two?\\n", "chosen": "Two and two? Four", "rejected": "\\nTwo and two?"}',
        [("/chosen", "completion-repeats-prompt"), ("/rejected", "completion-repeats-prompt")],
    ),
    "equal texts": (GOOD_PAIR.replace('"c"', '"b"'), [("/rejected", "chosen-equals-rejected")]),
    "equal but for spaces": (GOOD_PAIR.replace('"c"', '" b\\n"'), [("/rejected", "chosen-equals-rejected")]),
    "equal in NFKC": (  # ligature fi
        '{"prompt": "a", "chosen": "\\ufb01n", "rejected": "fin"}',
        [("/rejected", "chosen-equals-rejected")],
    ),
    "equal messages": (pair(rejected=f"[{ANSWER}]"), [("/rejected", "chosen-equals-rejected")]),
    "equal but for parts": (
        pair(rejected='[{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]'),
        [("/rejected", "chosen-equals-rejected")],
    ),
    "prompt alone is text": (pair(prompt='"Hi"'), [("/prompt", "mixed-forms")]),
    "rejected alone is text": (pair(rejected='"No"'), [("/rejected", "mixed-forms")]),
    "chosen alone is messages": (
        f'{{"prompt": "a", "chosen": [{ANSWER}], "rejected": "c"}}',
        [("/chosen", "mixed-forms")],
    ),
    "chosen is an object": (pair(chosen=ANSWER), [("/chosen", "wrong-type")]),
    "chosen has the prompt": (
        pair(chosen=f"[{USER}, {ANSWER}]"),
        [("/chosen/0/role", "first-not-assistant")],
    ),
    "rejected goes on": (
        pair(rejected=f"[{ANSWER}, {USER}]"),
        [("/rejected/1/role", "last-not-assistant")],
    ),
    "chosen is empty": (pair(chosen="[]"), [("/chosen", "no-messages")]),
    "empty texts": (
        '{"prompt": "a", "chosen": "", "rejected": ""}',
        [("/chosen", "empty-content"), ("/rejected", "empty-content")],
    ),
    "prompt ends with assistant": (
        pair(prompt=f"[{USER}, {ANSWER}]"),
        [("/prompt/1/role", "prompt-last-not-user")],
    ),
}
CASES = [("demonstration", GOOD, *case) for case in DEMONSTRATIONS.values()]
CASES += [("preference", GOOD_PAIR, *case) for case in PREFERENCES.values()]
NAMES = [*DEMONSTRATIONS, *(f"{name} (preference)" for name in PREFERENCES)]


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode()


def places(report):
    return [(error.line, error.pointer, error.code) for error in report.errors]


@pytest.mark.parametrize(("kind", "good", "row", "expected"), CASES, ids=NAMES)
def test_broken_row_in_jsonl(tmp_path, kind, good, row, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good.encode() + b"\n" + as_bytes(row) + b"\n" + good.encode() + b"\n")
    report = check_file(path, kind)
    assert places(report) == [(2, pointer, code) for pointer, code in expected]
    assert (report.rows, report.valid, report.error_count) == (3, 2, len(expected))
    assert report.error_counts.total() == report.error_count


# What ends a line and not a value means something else there; FILES has it.
LINES_ONLY = ("cut off", "two rows on a line", "mark in a later line")


@pytest.mark.parametrize(
    ("kind", "good", "row", "expected"),
    [case for case, name in zip(CASES, NAMES, strict=True) if name not in LINES_ONLY],
    ids=[name for name in NAMES if name not in LINES_ONLY],
)
def test_broken_row_in_array(tmp_path, kind, good, row, expected):
    """In a JSON array the pointer starts at the array, and a row that cannot be read ends it."""
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + good.encode() + b",\n" + as_bytes(row) + b"]")
    report = check_file(path, kind)
    assert places(report) == [(2, f"/1{pointer or ''}", code) for pointer, code in expected]
    assert (report.rows, report.valid) == (2, 1)


FILES = {
    "empty": (b"", (None, None, "empty-file")),
    "blank lines": (b"\n \n\t\r\n", (None, None, "empty-file")),
    "empty array": (b" [ ] ", (None, None, "empty-file")),
    "zip": (b"PK\x03\x04\x14\x00", (None, None, "unsupported-file")),
    "gzip, cut off": (b"\x1f\x8b\x08\x00", (None, None, "broken-archive")),
    "Parquet, cut off": (b"PAR1\x15\x04", (None, None, "invalid-table")),
    "UTF-16": (GOOD.encode("utf-16"), (None, None, "wrong-encoding")),
    "UTF-16 without mark": (GOOD.encode("utf-16-be"), (None, None, "wrong-encoding")),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), (1, None, "byte-order-mark")),
    "mark before array": (b"\xef\xbb\xbf[" + GOOD.encode() + b"]", (1, "/0", "byte-order-mark")),
    "object over lines, cut later": (b'{"data": [\n{}\n]}\n', (1, None, "not-rows")),
    "one object over lines": (b'\n{\n  "prompt": "a",\n  "completion": "b"\n}\n', (2, None, "not-rows")),
    "more after the array": (b"[" + GOOD.encode() + b"]\n{}", (2, None, "invalid-json")),
    "array not closed": (b"[" + GOOD.encode() + b"\n", (2, None, "invalid-json")),
    "comma missing in array": (
        b"[" + GOOD.encode() + b"\n" + GOOD.encode() + b"]",
        (2, None, "invalid-json"),
    ),
    "comma too many in array": (b"[" + GOOD.encode() + b",\n]", (2, "/1", "invalid-json")),
    "array cut in a row": (b"[" + GOOD.encode() + b',\n\n{"prompt": "a', (3, "/1", "invalid-json")),
    "array cut after a comma": (b"[" + GOOD.encode() + b",\n", (2, "/1", "invalid-json")),
    "bytes between rows": (
        b"[" + GOOD.encode() + b",\n\xff" + GOOD.encode() + b"]",
        (2, "/1", "broken-utf-8"),
    ),
}


@pytest.mark.parametrize(("data", "expected"), FILES.values(), ids=FILES)
def test_broken_file(tmp_path, data, expected):
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    report = check_file(path)
    assert places(report) == [expected]
    assert not report.ok


def test_an_object_over_lines_is_one_error_whatever_the_file_is_called(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(GOOD), indent=2))
    assert places(check_file(path)) == [(1, None, "not-rows")]


def test_value_on_its_own_line_of_an_indented_array(tmp_path):
    rows = [json.loads(GOOD), json.loads(talk(USER, '{"role": "bot", "content": ""}'))]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2))
    lines = path.read_text().splitlines()
    report = check_file(path)
    assert [error.pointer for error in report.errors] == ["/1/messages/1/role", "/1/messages/1/content"]
    for error, value in zip(report.errors, ['"bot"', '""'], strict=True):
        assert lines[error.line - 1][error.column - 1 :].startswith(value)


def test_column_is_where_the_value_begins(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "ä", "completion": 5}\n{"prompt": "a", "completion" "b"}\n')
    first, second = check_file(path).errors
    assert first.column == 31
    assert second.column == 30
    assert first.excerpt.text[first.excerpt.caret] == "5"
    assert first.as_dict()["column"] == 31
    assert "excerpt" not in first.as_dict()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_content_decides_between_lines_and_array(tmp_path, suffix):
    lines, array = tmp_path / f"lines{suffix}", tmp_path / f"array{suffix}"
    lines.write_text(f"{GOOD}\n\n{GOOD_PAIR}")
    array.write_text(f"\n[{GOOD},\n\n{GOOD_PAIR}\n]\n")
    assert places(check_file(lines)) == [(3, "", "wrong-kind")]
    assert places(check_file(array)) == [(4, "/1", "wrong-kind")]


def test_row_too_long(tmp_path):
    row = f'{{"prompt": "{"x" * MAX_ROW_BYTES}", "completion": "b"}}'
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"{GOOD}\n{row}\n{GOOD}\n{row}")
    array.write_text(f"[{GOOD},\n{row}]")
    assert places(check_file(lines)) == [(2, None, "row-too-long"), (4, None, "row-too-long")]
    assert places(check_file(array)) == [(2, "/1", "row-too-long")]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_longest_row_is_read(tmp_path, end):
    frame = '{"prompt": "", "completion": "b"}'
    path = tmp_path / "rows.jsonl"
    path.write_text(frame.replace('""', '"' + "x" * (MAX_ROW_BYTES - len(frame)) + '"') + end)
    assert check_file(path).ok


def test_64_levels_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "x": ' + "[" * 63 + "]" * 63 + "}")
    assert check_file(path).ok


def test_brackets_and_escapes_in_text_are_text(tmp_path):
    text = '{"prompt": "' + "[{" * 100 + '", "completion": "\\\\u0000 \\ud83d\\ude00 NaN", "id": 18446744073709551615}'
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert check_file(path).ok


@pytest.mark.parametrize(
    ("path", "code"), [("missing.jsonl", "no-such-file"), (".", "is-a-folder"), ("nul\0", "unreadable-file")]
)
def test_path_without_a_file(tmp_path, path, code):
    report = check_file(tmp_path / path)
    assert [error.code for error in report.errors] == [code]
    assert (report.rows, report.sha256) == (0, "")
    with pytest.raises(PipelineError) as caught:
        load_rows(tmp_path / path, "demonstration")
    assert (caught.value.code, caught.value.exit_code) == (code, ExitCode.USAGE)


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert places(check_file(tmp_path / "pipe")) == [(None, None, "special-file")]


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    (error,) = check_file(path).errors
    assert (error.code, error.message) == ("unreadable-file", "cannot be read: permission denied")


ACCEPTED = {
    "conversation": ("demonstration", "messages", talk(USER, ANSWER)),
    "with system": ("demonstration", "messages", talk(SYSTEM, USER, ANSWER, USER, ANSWER)),
    "with developer": (
        "demonstration",
        "messages",
        talk(SYSTEM.replace("system", "developer"), USER, ANSWER),
    ),
    "with tools": ("demonstration", "messages", talk(USER, CALL, RESULT, RESULT, ANSWER)),
    "blank result": ("demonstration", "messages", talk(USER, CALL, RESULT.replace("noon", ""), ANSWER)),
    "null beside calls": (
        "demonstration",
        "messages",
        talk(USER, CALL.replace('"tool', '"content": null, "tool')),
    ),
    "nulls of a table": (
        "demonstration",
        "messages",
        '{"prompt": null, "completion": null, "tools": null, '
        + talk(USER.replace("}", ', "tool_calls": null}'), ANSWER)[1:],
    ),
    "parts": (
        "demonstration",
        "messages",
        talk(
            '{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}',
            ANSWER,
        ),
    ),
    "tools as text": ("demonstration", "messages", '{"tools": "[{}]", ' + talk(USER, ANSWER)[1:]),
    "prompt beside messages": ("demonstration", "messages", '{"prompt": "Hi", ' + talk(USER, ANSWER)[1:]),
    "other keys": (
        "demonstration",
        "standard-prompt-completion",
        GOOD.replace("}", ', "id": 1.5, "images": []}'),
    ),
    "text": ("demonstration", "standard-prompt-completion", GOOD),
    "prompt and completion": (
        "demonstration",
        "conversational-prompt-completion",
        f'{{"prompt": [{SYSTEM}, {USER}], "completion": [{ANSWER}, {USER}, {ANSWER}]}}',
    ),
    "prompt ends with result": (
        "demonstration",
        "conversational-prompt-completion",
        f'{{"prompt": [{USER}, {CALL}, {RESULT}], "completion": [{ANSWER}]}}',
    ),
    "pair": ("preference", "conversational-preference", pair()),
    "begins like the prompt": (
        "demonstration",
        "standard-prompt-completion",
        '{"prompt": "Two and two?", "completion": "Two and two make four"}',
    ),
    "begins with a short prompt": (
        "demonstration",
        "standard-prompt-completion",
        '{"prompt": "Two", "completion": "Two."}',
    ),
    "answer that repeats a sentence": (
        "demonstration",
        "messages",
        talk(
            '{"role": "user", "content": "She goes to school."}',
            '{"role": "assistant", "content": "She goes to school."}',
        ),
    ),
    "pair of texts": ("preference", "standard-preference", GOOD_PAIR),
    "pair with messages": ("preference", "standard-preference", GOOD_PAIR.replace("}", ', "messages": [1]}')),
    "call or answer": ("preference", "conversational-preference", pair(rejected=f"[{CALL}]")),
}


@pytest.mark.parametrize(("kind", "format", "row"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_row(tmp_path, kind, format, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\r\n")
    report = check_file(path)
    assert report.errors == []
    assert (report.ok, report.kind, report.format, report.rows, report.valid) == (True, kind, format, 1, 1)
    assert len(load_rows(path, kind)) == 1


# Of rows that are right by themselves: test_suspect.py and test_overlap.py have them.
WARNINGS = {"duplicate-row", "near-duplicate", "opposite-preference", "few-rows", "length-bias"}
WARNINGS |= {"evaluated-on-training-data", "shared-prompts", "duplicate-across-files", "near-duplicate-across-files"}


def test_every_code_has_a_case():
    """All but those that the tests below and above raise by other means."""
    covered = {code for *_, expected in CASES for _, code in expected} | {code for _, (_, _, code) in FILES.values()}
    elsewhere = {"no-such-file", "is-a-folder", "special-file", "unreadable-file", "row-too-long", "file-changed"}
    elsewhere |= {"unreadable-dataset", "archive-too-large", "unknown-column"}  # test_files.py has them
    elsewhere |= {"symbolic-link"}  # test_read.py has it
    elsewhere |= {"nothing-to-train", "invalid-transcript", "prompts-differ", "no-answer"}  # and test_formats.py these
    assert covered | elsewhere | WARNINGS == set(MENDS)


def test_duplicate_rows_are_warned_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [f'{{"prompt": "{number}", "completion": "b"}}' for number in range(12)]
    rows[7] = rows[3].replace("{", '{"id": 7, ')  # trains on the same
    path.write_text("\n".join(rows))
    report = check_file(path)
    assert report.ok
    (warning,) = report.warnings
    assert (warning.line, warning.code, warning.severity) == (8, "duplicate-row", "warning")
    assert warning.message == "the same row as at line 4"
    assert report.audit["duplicate_rows"] == 1


def test_duplicate_in_an_array_is_named_by_its_pointer(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{GOOD}, {GOOD}]")
    warning = check_file(path).warnings[0]
    assert (warning.pointer, warning.message) == ("/1", "the same row as at line 1 (/0)")


@pytest.mark.parametrize(("count", "codes"), [(1, ["few-rows"]), (9, ["few-rows"]), (10, [])])
def test_few_rows_are_warned_of(tmp_path, count, codes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{number}", "completion": "b"}}\n' for number in range(count)))
    assert [warning.code for warning in check_file(path).warnings] == codes


def test_all_errors_are_counted_and_some_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "", "completion": ""}\n' * 30)
    report = check_file(path, max_errors=7)
    assert (len(report.errors), report.error_count, report.rows, report.valid) == (7, 60, 30, 0)
    assert report.errors[6].line == 4
    assert report.error_counts == {"empty-content": 60}


def test_one_row_cannot_have_endless_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [' + "1, " * (MAX_FINDINGS_PER_ROW + 5) + "1]}")
    assert check_file(path).error_count == MAX_FINDINGS_PER_ROW


def test_first_row_with_a_kind_decides(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{{\n1\n{{}}\n{GOOD_PAIR}\n{GOOD}\n".replace("{\n", "{]\n", 1))
    report = check_file(path)
    codes = [(error.line, error.code) for error in report.errors]
    assert codes == [(1, "invalid-json"), (2, "not-an-object"), (3, "unknown-shape"), (5, "wrong-kind")]
    assert report.kind == "preference"


def test_audit_counts_by_hand(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "abc", "completion": "de"}}\n{talk(SYSTEM, USER, ANSWER)}\n{{}}\n')
    report = check_file(path)
    audit = dict(report.audit)
    # The hash is an independent implementation's, over the same bytes.
    hashed = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert audit.pop("sha256") == hashed == report.sha256
    assert report.format == "mixed"
    assert audit == {
        "formats": {"standard-prompt-completion": 2, "messages": 1},
        "characters": {
            "prompt": {"count": 2, "mean": 2.0, "min": 1, "p50": 1, "p95": 3, "max": 3},
            "completion": {"count": 2, "mean": 1.5, "min": 1, "p50": 1, "p95": 2, "max": 2},
            "messages": {"count": 1, "mean": 14.0, "min": 14, "p50": 14, "p95": 14, "max": 14},  # Be kind, Hi, Hello
        },
        "turns": {"count": 3, "mean": 2.33, "min": 2, "p50": 2, "p95": 3, "max": 3},
        "duplicate_rows": 0,
    }


def test_audit_of_preferences_counts_the_chosen_conversation(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(pair(chosen=f"[{ANSWER}, {USER}, {ANSWER}]"))
    audit = check_file(path).audit
    assert audit["turns"]["max"] == 4
    characters = {name: measure["mean"] for name, measure in audit["characters"].items()}
    assert characters == {"prompt": 2.0, "chosen": 12.0, "rejected": 2.0}  # Hi; Hello, Hi, Hello; Go


def test_load_rows_gives_canonical_rows(tmp_path):
    demonstrations, preferences = tmp_path / "d.jsonl", tmp_path / "p.json"
    demonstrations.write_text(f"{GOOD}\n\n{talk(USER, ANSWER)}\n")
    preferences.write_text(f"[{GOOD_PAIR}]")
    checked = load_rows(demonstrations, "demonstration")
    assert list(checked) == [
        Demonstration(prompt="a", completion="b"),
        Demonstration(messages=[json.loads(USER), json.loads(ANSWER)]),
    ]
    assert [row.line for row in checked.rows] == [1, 3]
    assert checked.report.rows == 2
    assert load_rows(preferences, "preference").rows == [Preference("a", "b", "c")]


def test_load_rows_refuses_a_file_with_one_wrong_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{talk(USER)}\n{GOOD}\n")
    with pytest.raises(PipelineErrors) as caught:
        load_rows(path, "demonstration")
    error = caught.value
    assert (error.code, error.exit_code) == ("invalid-rows", ExitCode.WRONG)
    assert "1 of 3 rows" in error.message
    assert f"{path}:2 /messages" in error.message
    assert f"pipeline validate {path}" in error.mend
    assert [inner.code for inner in error.errors] == ["invalid-rows", "no-assistant-turn"]


def test_load_rows_refuses_though_no_error_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{{}}\n")
    with pytest.raises(PipelineErrors, match="1 of 2 rows"):
        load_rows(path, "demonstration", max_errors=0)


def test_messages_never_carry_long_text(tmp_path):
    secret = "secret " * 50
    rows = [
        json.dumps({"messages": [{"role": secret, "content": "x"}, {"role": "user", "content": {secret: secret}}]}),
        json.dumps({secret: secret}),
        f'{{"prompt": "a", "completion": "b", {json.dumps(secret)}: 1, {json.dumps(secret)}: 1}}',
        json.dumps({"messages": [{"role": "user", "content": [{"type": secret}]}]}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    report = check_file(path, "demonstration")
    assert len(report.errors) >= 5
    for error in report.errors:
        assert len(error.message) < 130
        assert len(error.mend) < 130
        assert len(error.pointer) < 130


def test_torch_is_not_imported():
    code = "import sys, pipeline.data.check, pipeline.data.report; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jsonschema" in modules
    assert not {"torch", "transformers", "datasets", "numpy", "pandas", "pyarrow"} & set(modules)


def survives(path, data):
    path.write_bytes(data)
    for kind in (None, "demonstration", "preference"):
        report = check_file(path, kind, max_errors=5)
        json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False).encode()
        assert report.valid <= report.rows
        assert report.ok == (report.error_count == 0)
        assert report.ok <= (report.valid == report.rows > 0)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
@example(b"[")
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf[\xff")
@example(b'[{"\xff"]')
@example(b'{"messages": [{"role": "\\ud800", "content": "\\u0000"}]}')
def test_any_bytes_give_a_report(tmp_path_factory, data):
    survives(tmp_path_factory.getbasetemp() / "any.jsonl", data)


WORDS = ["messages", "prompt", "completion", "chosen", "rejected", "tools", "role", "content", "tool_calls"]
WORDS += ["function", "name", "arguments", "type", "text", "user", "assistant", "system", "tool", "images"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=300)
@given(st.lists(VALUES, max_size=3), st.booleans())
def test_any_json_gives_a_report(tmp_path_factory, values, as_array):
    text = json.dumps(values, indent=1) if as_array else "\n".join(map(json.dumps, values))
    survives(tmp_path_factory.getbasetemp() / "json.jsonl", text.encode())


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_to_a_good_file_gives_a_report(tmp_path_factory, data):
    good = (talk(SYSTEM, USER, CALL, RESULT, ANSWER) + "\n" + pair() + "\n" + GOOD_PAIR).encode()
    at = data.draw(st.integers(0, len(good)))
    upto = data.draw(st.integers(at, min(at + 20, len(good))))
    survives(
        tmp_path_factory.getbasetemp() / "cut.jsonl",
        good[:at] + data.draw(st.binary(max_size=4)) + good[upto:],
    )
