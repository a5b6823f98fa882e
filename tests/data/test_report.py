import io
import json
from itertools import pairwise

import pytest
from rich.console import Console

from pipeline.data.check import check_file
from pipeline.data.report import as_json, print_reports

GOOD = '{"prompt": "a", "completion": "b"}\n'
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).write_text(text)
        return name

    return write


def printed(*reports, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_reports(reports, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_report_as_a_person_reads_it(write):
    rows = ['{"prompt": "a", "completion": 5}', '{"prompt": "", "completion": "b"}'] + [GOOD.strip()] * 6
    rows += ['{"prompt": "a", "completion": " "}'] * 5
    report = check_file(write("rows.jsonl", "\n".join(rows)))
    assert printed(report) == (
        "✗ rows.jsonl  7 of 13 rows wrong  7 errors  demonstration  standard-prompt-completion\n"
        "  empty-content  6 times\n"
        "    rows.jsonl:2 /prompt: `prompt` is empty\n"
        '      {"prompt": "", "completion": "b"}\n'
        "                 ^\n"
        "    also at line 9 /completion, line 10 /completion, line 11 /completion and 2 more\n"
        "    mend: write the text, or drop the row\n"
        "  wrong-type\n"
        "    rows.jsonl:1 /completion: `completion` is a number, not text\n"
        '      {"prompt": "a", "completion": 5}\n'
        "                                    ^\n"
        "    mend: change the value's type\n"
        "  duplicate-row  5 times\n"
        "    rows.jsonl:4: the same row as at line 3\n"
        "    also at line 5, line 6, line 7 and 1 more\n"
        "    mend: drop the copy, unless the row is meant to count twice\n"
    )


def test_files_without_rows_and_files_that_are_right(write):
    good = "".join(f'{{"prompt": "{number}", "completion": "b"}}\n' for number in range(10))
    reports = [check_file(write("good.jsonl", good)), check_file(write("empty.jsonl", "")), check_file("gone.jsonl")]
    assert printed(*reports).splitlines() == [
        "✓ good.jsonl  10 rows  demonstration  standard-prompt-completion",
        "✗ empty.jsonl  1 error",
        "  empty-file",
        "    the file is empty",
        "    mend: put at least one row into the file",
        "✗ gone.jsonl  1 error",
        "  no-such-file",
        "    no such file",
        "    mend: check the path: relative to the current folder, or to the experiment that names it",
        "1 of 3 files without errors",
    ]


def test_caret_stands_below_the_value_after_wide_characters(write):
    report = check_file(write("rows.jsonl", '{"prompt": "你好", "completion": 5}\n'))
    lines = printed(report).splitlines()
    text, caret = next((a, b) for a, b in pairwise(lines) if b.strip() == "^")
    # Each of the two characters takes two cells, so the caret stands two further than the index.
    assert caret.index("^") == text.index("5") + 2


def test_a_narrow_terminal_still_shows_the_value(write):
    report = check_file(write("rows.jsonl", '{"prompt": "' + "x" * 60 + '", "completion": 5}\n'))
    lines = printed(report, width=40).splitlines()
    text, caret = next((a, b) for a, b in pairwise(lines) if b.strip() == "^")
    assert text[caret.index("^")] == "5"
    assert len(text) <= 40


def test_errors_beyond_the_kept_ones_are_counted(write):
    report = check_file(write("rows.jsonl", "1\n" * 4 + GOOD + "{]\n" * 9), max_errors=2)
    lines = printed(report).splitlines()
    assert "  invalid-json  9 times  (past the last one that is shown)" in lines
    assert "    also at line 2 and 2 more" in lines


def test_nothing_in_a_file_is_taken_for_markup_or_escapes(write):
    report = check_file(write("rows.jsonl", '{"[red]x[/nope]": 1}\n{"\x1b[31m": 1}\n'))
    gone = check_file("gone\x1b[31m.jsonl")
    text = printed(report, gone)
    assert "[red]x[/nope]" in text
    assert "gone�[31m.jsonl" in text
    assert "\x1b" not in text


def test_a_terminal_without_unicode(write):
    report = check_file(write("rows.jsonl", '{"prompt": "é", "completion": 5}\n'))
    assert printed(report, encoding="ascii").startswith("!! rows.jsonl")


def test_json_of_one_file(write):
    report = check_file(write("rows.jsonl", GOOD + '{"prompt": "a", "completion": 5}\n'))
    printed_json = as_json([report])
    assert json.loads(json.dumps(printed_json)) == printed_json
    (error,) = printed_json["errors"]
    assert error == {
        "file": "rows.jsonl",
        "line": 2,
        "column": 31,
        "pointer": "/completion",
        "code": "wrong-type",
        "message": "`completion` is a number, not text",
        "severity": "error",
        "mend": "change the value's type",
    }
    assert [warning["code"] for warning in printed_json["warnings"]] == ["few-rows"]
    assert printed_json["audit"]["sha256"] == report.sha256
    (file,) = printed_json.pop("files")
    assert file.pop("file") == "rows.jsonl"
    assert file == printed_json


def test_json_of_several_files(write):
    reports = [
        check_file(write("one.jsonl", GOOD + '{"prompt": "abc", "completion": "de"}\n')),
        check_file(write("two.jsonl", '{"prompt": "abcde", "completion": "f"}\n1\n')),
        check_file("gone.jsonl"),
    ]
    summed = as_json(reports)
    assert {key: summed[key] for key in ("ok", "rows", "valid", "kind", "format", "error_count")} == {
        "ok": False,
        "rows": 4,
        "valid": 3,
        "kind": "demonstration",
        "format": "standard-prompt-completion",
        "error_count": 2,
    }
    assert [(error["file"], error["code"]) for error in summed["errors"]] == [
        ("two.jsonl", "not-an-object"),
        ("gone.jsonl", "no-such-file"),
    ]
    assert summed["audit"] == {
        "formats": {"standard-prompt-completion": 3},
        "characters": {
            "prompt": {"count": 3, "mean": 3.0, "min": 1, "p50": 3, "p95": 5, "max": 5},  # 1, 3, 5
            "completion": {"count": 3, "mean": 1.33, "min": 1, "p50": 1, "p95": 2, "max": 2},  # 1, 2, 1
        },
        "turns": {"count": 3, "mean": 2.0, "min": 2, "p50": 2, "p95": 2, "max": 2},
        "duplicate_rows": 0,
    }
    assert [file["file"] for file in summed["files"]] == ["one.jsonl", "two.jsonl", "gone.jsonl"]


def test_json_of_different_kinds_is_mixed(write):
    summed = as_json([check_file(write("one.jsonl", GOOD)), check_file(write("two.jsonl", PAIR))])
    assert (summed["ok"], summed["kind"], summed["format"]) == (True, "mixed", "mixed")
    assert summed["audit"]["characters"].keys() == {"prompt", "completion", "chosen", "rejected"}
