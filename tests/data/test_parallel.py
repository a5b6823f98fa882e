"""The report of several processes is that of one, to the last character."""

import json
import os
import random

import pytest

from pipeline.data import parallel
from pipeline.data.check import check_file
from pipeline.data.parallel import _pieces, check_large_file

GOOD = '{"prompt": "a %d", "chosen": "b", "rejected": "c"}'
ODD = [
    "",
    " \r",
    "{}",
    "1",
    '{"prompt": "a", "chosen": "b"',
    '{"prompt": "a", "chosen": "b", "rejected": "b"}',
    '{"prompt": "a 3", "chosen": "c", "rejected": "b"}',
    '{"prompt": "é", "chosen": 1, "rejected": NaN}',
    '{"prompt": "a", "completion": "b"}',
    '\ufeff{"prompt": "a", "chosen": "b", "rejected": "c"}',
    '{"chosen": null, "x": 1}',
    '{"prompt": [{"role": "user", "content": "' + "long " * 300 + '"}], "chosen": [], "rejected": []}',
]


def whole(report):
    return report, json.dumps(report.as_dict()), report.error_counts, report.warning_counts, report.counts


def same(path, kind=None, max_errors=100, **options):
    one = check_file(path, kind, max_errors=max_errors)
    several = check_large_file(path, kind, max_errors=max_errors, near=False, workers=2, **options)
    assert whole(several) == whole(one)
    assert list(several.prints.prompts) == list(one.prints.prompts)
    assert list(several.prints.rows) == list(one.prints.rows)
    places = [[it.place(it.prompt_row(n)) for n in range(len(it.prompts))] for it in (several.prints, one.prints)]
    assert places[0] == places[1]
    return one


@pytest.fixture
def rows():
    """Three hundred lines, every third one odd, in an order that is the same each time."""
    draw = random.Random(7)
    return [draw.choice(ODD) if draw.random() < 0.3 else GOOD % draw.randrange(40) for _ in range(300)]


@pytest.mark.parametrize("kind", [None, "preference", "demonstration"])
@pytest.mark.parametrize("piece_bytes", [200, 1500])
def test_the_same_report(tmp_path, rows, kind, piece_bytes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    report = same(path, kind, piece_bytes=piece_bytes, max_errors=20)
    if kind != "demonstration":
        assert {"duplicate-row", "opposite-preference"} <= report.warning_counts.keys()
        assert report.error_count > len(report.errors) == 20


def test_pieces_end_at_line_ends_and_leave_nothing_out(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    data = "\n".join(rows).encode()
    path.write_bytes(data)
    for size in (1, 7, 200, 10**6):
        pieces = [data[start:end] for start, end in _pieces(path, len(data), size)]
        assert b"".join(pieces) == data
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])
        assert all(pieces)


FILES = {
    "array": "[" + GOOD % 1 + "]",
    "empty": "",
    "blank": "\n\n\n",
    "object over lines": '{\n"prompt": "a"\n}\n',
    "nothing known": "{}\n" * 50,
    "kind found late": "{}\n" * 50 + GOOD % 1,
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_files_that_are_not_divided(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    same(path, piece_bytes=20)
    same(tmp_path / "gone.jsonl")


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text((GOOD % 1 + "\n") * 20)
    hashed = parallel._hash

    def grow(path):
        answer = hashed(path)
        with path.open("a") as file:
            file.write(GOOD % 2 + "\n")
        return answer

    monkeypatch.setattr(parallel, "_hash", grow)
    report = check_large_file(path, near=False, workers=2)
    assert [error.code for error in report.errors] == ["file-changed"]
    assert (report.sha256, report.rows, report.ok) == ("", 20, False)


def test_small_files_are_checked_in_one_process(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD % 1)
    monkeypatch.setattr(parallel, "_check", lambda *_: pytest.fail("several processes"))
    assert check_large_file(path).ok


def test_a_worker_that_dies_is_made_up_for(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD % 1)
    monkeypatch.setattr(parallel, "_let_parent_handle_interrupts", os.abort)
    assert check_large_file(path, near=False, workers=2) == check_file(path)
