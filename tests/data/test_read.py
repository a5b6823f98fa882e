import hashlib
import tracemalloc

from pipeline.data.read import Source


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
