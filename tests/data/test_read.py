import hashlib
import tracemalloc

import pytest

from pipeline.data.read import Source
from pipeline.errors import PipelineError


def test_rows_carry_their_places(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n {"a": 1}, 2,\n\n 3]')
    rows = list(Source(path).rows())
    assert [(row.index, row.line, row.value) for row in rows] == [(0, 2, {"a": 1}), (1, 2, 2), (2, 4, 3)]
    assert [row.text[row.start] for row in rows] == ["{", "2", "3"]


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Other characters that end lines elsewhere (U+2028, U+0085) may stand in JSON text."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes('"a\u2028b\u0085c"\r\n\n "d"'.encode())
    assert [(row.line, row.value) for row in Source(path).rows()] == [(1, "a\u2028b\u0085c"), (3, "d")]


def test_hash_is_that_of_all_bytes_and_known_at_the_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    data = b'\xef\xbb\xbf{}\r\n\n{"x": 1}\n\xff\n' + b"x" * (17 * 2**20) + b"\n{}"
    path.write_bytes(data)
    source = Source(path)
    rows = source.rows()
    next(rows)
    assert source.sha256 == ""
    assert len(list(rows)) == 4
    assert source.sha256 == hashlib.sha256(data).hexdigest()


def test_lines_are_read_one_by_one(tmp_path):
    """20 MB of rows of 10 kB pass through less than 1 MB of memory."""
    path = tmp_path / "rows.jsonl"
    path.write_text(('{"messages": "' + "x" * 10_000 + '"}\n') * 2000)
    tracemalloc.start()
    assert sum(1 for _ in Source(path).rows()) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("change", ["append", "replace", "delete"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    path.write_text("{}\n{}\n")
    source = Source(path)
    rows = source.rows()
    next(rows)
    if change == "append":
        with path.open("a") as file:
            file.write("{}\n")
    elif change == "replace":
        other.write_text("{}\n{}\n")
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(PipelineError) as caught:
        list(rows)
    assert caught.value.code == ("unreadable-file" if change == "delete" else "file-changed")
    assert source.sha256 == ""


def test_a_link_that_leads_to_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.symlink_to(path)
    with pytest.raises(PipelineError) as caught:
        list(Source(path).rows())
    assert caught.value.code == "unreadable-file"


def test_a_link_to_a_file_is_refused_and_the_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(PipelineError) as caught:
        list(Source(tmp_path / "link.jsonl").rows())
    assert caught.value.code == "symbolic-link"
    assert caught.value.mend.endswith(f": {tmp_path.resolve() / 'rows.jsonl'}")


def test_a_file_behind_a_linked_folder_is_read(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "data").symlink_to("real")
    assert len(list(Source(tmp_path / "data" / "rows.jsonl").rows())) == 1


def test_snapshots_of_the_hubs_cache_are_links_and_are_read(tmp_path):
    blobs, snapshot = tmp_path / "datasets--x--y" / "blobs", tmp_path / "datasets--x--y" / "snapshots" / "1" / "data"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0a").write_text("{}\n")
    (tmp_path / "elsewhere").write_text("{}\n")
    (snapshot / "rows.jsonl").symlink_to("../../../blobs/0a")
    (snapshot / "other.jsonl").symlink_to(tmp_path / "elsewhere")
    assert len(list(Source(snapshot / "rows.jsonl").rows())) == 1
    with pytest.raises(PipelineError) as caught:
        list(Source(snapshot / "other.jsonl").rows())
    assert caught.value.code == "symbolic-link"
