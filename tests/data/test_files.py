"""Files that are no plain JSON: archives, tables, shards and data sets."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.archives import FREE_BYTES, MAX_RATIO
from pipeline.data.check import check_file, load_rows
from pipeline.data.columns import read_map
from pipeline.data.hub import DatasetError, address
from pipeline.data.rows import Demonstration, Preference
from pipeline.data.shards import expand
from pipeline.errors import ExitCode, PipelineError
from pipeline.validation import validate

GOOD = {"prompt": "a", "completion": "b"}
BAD = {"prompt": "a", "completion": ""}
LINES = "".join(json.dumps(row) + "\n" for row in (GOOD, BAD, GOOD)).encode()
ARRAY = json.dumps([GOOD, BAD, GOOD], indent=1).encode()
CSV = b'prompt,completion\r\na,b\r\na,\r\n"two\nlines","c, ""d"""\r\n'
PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_content_size=False).compress}


def places(report):
    return [(error.line, error.pointer, error.code) for error in report.errors]


def parquet(path, rows, **options):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
@pytest.mark.parametrize(
    ("name", "data", "place"),
    [
        ("rows.jsonl", LINES, (2, "/completion")),
        ("rows.json", ARRAY, (8, "/1/completion")),
        ("rows.csv", CSV, (3, "/completion")),
    ],
)
def test_archive_is_read_as_what_it_holds(tmp_path, name, data, place, pack):
    plain, packed = tmp_path / name, tmp_path / f"{name}.packed"
    if name.endswith(".csv"):
        packed = tmp_path / f"{name}.gz"  # of CSV the name says what it is
    plain.write_bytes(data)
    packed.write_bytes(pack(data))
    assert places(check_file(plain)) == places(check_file(packed)) == [(*place, "empty-content")]
    hashed = subprocess.run(["sha256sum", str(packed)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert check_file(packed).sha256 == hashed


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
def test_archive_of_several_frames(tmp_path, pack):
    path = tmp_path / "rows.jsonl.packed"
    path.write_bytes(pack(LINES[:20]) + pack(LINES[20:]) + b"\0" * 600)
    assert check_file(path).rows == 3


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
def test_archive_that_is_damaged(tmp_path, pack):
    path = tmp_path / "rows.jsonl.packed"
    whole = pack(os.urandom(5000).hex().encode() + b"\n" + LINES)
    for broken in (whole[:-1], whole[:-3], whole[: len(whole) // 2], whole[:5], whole + b"more", whole + whole[:9]):
        path.write_bytes(broken)
        report = check_file(path)
        assert report.errors[-1].code == "broken-archive"
        assert report.sha256 == ""
    flipped = bytearray(gzip.compress(LINES))
    flipped[-6] ^= 1  # in the checksum
    path.write_bytes(bytes(flipped))
    assert check_file(path).errors[-1].code == "broken-archive"


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
def test_bomb_is_given_up_early(tmp_path, pack):
    path = tmp_path / "rows.jsonl.packed"
    data = (b" " * 2**20 + b"\n") * (FREE_BYTES // 2**20 + 8)
    path.write_bytes(pack(data))
    assert len(path.read_bytes()) * MAX_RATIO < len(data)
    assert [error.code for error in check_file(path).errors] == ["archive-too-large"]


def test_csv_has_records_of_several_lines_and_a_mark_in_front(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + CSV.replace(b"a,\r\n", b"\r\n"))
    checked = load_rows(path, "demonstration")
    assert checked.rows == [
        Demonstration(prompt="a", completion="b"),
        Demonstration(prompt="two\nlines", completion='c, "d"'),
    ]
    assert [row.line for row in checked.rows] == [2, 4]


def test_csv_of_conversations(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    quoted = json.dumps(turns).replace('"', '""')
    path = tmp_path / "rows.tsv"
    path.write_text(f'id\tmessages\ttools\n1\t"{quoted}"\t\n2\t[1\t\n')
    report = check_file(path)
    assert places(report) == [(3, "/messages", "invalid-json")]
    path.write_text(f'id\tmessages\ttools\n1\t"{quoted}"\t\n')
    assert load_rows(path, "demonstration").rows == [Demonstration(messages=turns)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"prompt,completion\n", [(None, None, "empty-file")]),
        (b"", [(None, None, "empty-file")]),
        (b"prompt,completion\na,b,c\na,b\n", [(2, "", "invalid-table")]),
        (b"prompt,completion\na\n", [(2, "", "invalid-table")]),
        (b'prompt,completion\na,b\n"a,b\n', [(3, None, "invalid-table")]),
        (b'prompt,completion\na,"b"c\n', [(2, None, "invalid-table")]),
        (b"prompt,prompt\na,b\n", [(1, None, "invalid-table")]),
        (b"prompt,completion\na,\xff\n", [(2, "/completion", "broken-utf-8")]),
        (b"prompt,completion\na,b\0\n", [(2, "/completion", "nul-character")]),
        (b"prompt;completion\na;b\n", [(2, "", "unknown-shape")]),
        (b'prompt,completion\n"\n\n ",b\n', [(2, "/prompt", "empty-content")]),
        ("prompt,completion\na,b\n".encode("utf-16"), [(None, None, "wrong-encoding")]),
    ],
)
def test_broken_csv(tmp_path, data, expected):
    path = tmp_path / "rows.csv"
    path.write_bytes(data)
    assert places(check_file(path)) == expected


PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "score": 1.0},
    {"prompt": "a", "chosen": "", "rejected": "c", "score": float("nan")},
    {"prompt": "a", "chosen": "b", "rejected": "c\0", "score": None},
]


@pytest.mark.parametrize("form", ["parquet", "feather", "arrow", "stream", "parquet.gz", "arrow.zst"])
def test_table_has_numbers_for_lines(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    table = pa.Table.from_pylist(PAIRS)
    if form.startswith("parquet"):
        pa.parquet.write_table(table, path)
    elif form == "stream":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        pa.feather.write_feather(table, path, compression="uncompressed" if form == "arrow" else None)
    if path.suffix in PACK:
        path.write_bytes(PACK[path.suffix](path.read_bytes()))
    report = check_file(path)
    assert places(report) == [(None, "/1/chosen", "empty-content"), (None, "/2/rejected", "nul-character")]
    assert (report.rows, report.valid, report.format) == (3, 1, "standard-preference")
    assert all(error.column is None for error in report.errors)
    hashed = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert report.sha256 == hashed


def test_rows_of_a_table_are_counted_from_1(tmp_path):
    path = parquet(tmp_path / "rows.parquet", [GOOD] * 200, row_group_size=70)
    assert [row.line for row in load_rows(path, "demonstration").rows] == list(range(1, 201))


def test_table_with_structs_and_values_that_json_lacks(tmp_path):
    import datetime

    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "at": datetime.date(2026, 1, 2), "weight": None, "raw": b"x"},
                {"role": "assistant", "content": "b", "at": None, "weight": 1, "raw": None},
            ],
            "when": datetime.datetime(2026, 1, 2),
        }
    ]
    path = parquet(tmp_path / "rows.parquet", rows)
    (row,) = load_rows(path, "demonstration").rows
    assert row.messages == [
        {"role": "user", "content": "a", "at": "2026-01-02"},
        {"role": "assistant", "content": "b"},
    ]


def test_table_whose_text_is_not_utf_8(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "a"],
            "completion": pa.StringArray.from_buffers(
                2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"b\xff")
            ),
        }
    )
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    assert places(check_file(tmp_path / "rows.parquet")) == [(None, "/1", "broken-utf-8")]


def test_table_without_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert places(check_file(path)) == [(None, None, "empty-file")]


def test_damaged_table(tmp_path):
    path = parquet(tmp_path / "rows.parquet", [GOOD] * 50)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:50], whole[:4] + b"\xff" * 30 + whole[34:]):
        path.write_bytes(broken)
        assert check_file(path).errors[-1].code == "invalid-table"


def test_offsets_of_an_arrow_file_are_not_followed_out_of_it(tmp_path):
    path = tmp_path / "rows.arrow"
    batch = pa.record_batch({"prompt": ["x" * 0x0103], "completion": ["b"]})
    with pa.ipc.new_stream(path, batch.schema) as stream:
        stream.write_batch(batch)
    whole = path.read_bytes()
    head, offsets, rest = whole.rpartition(b"\0\0\0\0\x03\x01\0\0")  # before it in the file: lengths of buffers
    assert offsets
    path.write_bytes(head + b"\0\0\0\0\xff\xff\xff\x0f" + rest)  # the prompt would end far behind the file
    assert places(check_file(path)) == [(None, None, "invalid-table")]


def test_columns_under_other_names(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,good,bad,prompt\nWhy?,Because,,old\nWhy?,Because,No,old\n")
    columns = read_map(["q=prompt", "good=chosen", "bad=rejected"])
    report = check_file(path, columns=columns)
    assert places(report) == [(2, "/bad", "empty-content")]
    path.write_text("q,good,bad,prompt\nWhy?,Because,No,old\n")
    assert load_rows(path, "preference", columns=columns).rows == [Preference("Why?", "Because", "No")]


def test_columns_of_jsonl_keep_their_place_in_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "completion": "b"}\n{"q": 5, "completion": "b"}\n')
    (error,) = check_file(path, columns={"q": "prompt"}).errors
    assert (error.line, error.column, error.pointer) == (2, 7, "/q")


def test_unknown_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "completion": "b"}\n' * 3)
    report = check_file(path, "demonstration", columns={"qestion": "prompt"}, max_errors=2)
    assert (report.errors[0].code, report.errors[0].mend) == ("unknown-column", "did you mean `question`?")
    with pytest.raises(PipelineError) as caught:
        load_rows(path, "demonstration", columns={"qestion": "prompt"})
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("pairs", "mend"),
    [
        (["question"], "--map question=prompt"),
        (["=prompt"], "--map question=prompt"),
        (["question=promt"], "did you mean `prompt`?"),
        (["a=prompt", "b=prompt"], "name each once"),
        (["a=prompt", "a=chosen"], "name each once"),
    ],
)
def test_bad_map(pairs, mend):
    with pytest.raises(PipelineError) as caught:
        read_map(pairs)
    assert (caught.value.code, caught.value.exit_code) == ("bad-map", ExitCode.USAGE)
    assert mend in caught.value.mend


def shards(folder):
    folder.mkdir(exist_ok=True)
    (folder / "b.jsonl").write_bytes(LINES)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    parquet(folder / "c.parquet", [GOOD, GOOD])
    (folder / ".hidden.jsonl").write_text("{")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "README.md").write_text("no data")
    return folder


def test_folder_and_glob_stand_for_shards(tmp_path):
    folder = shards(tmp_path / "data")
    names = ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert [path.name for path in expand(folder)] == names
    assert [path.name for path in expand(folder / "[ab]*")] == names[:2]
    assert [path.name for path in expand(tmp_path / "**" / "*.parquet")] == names[2:]
    odd = tmp_path / "rows[1].jsonl"
    odd.write_bytes(LINES)
    assert expand(odd) == [odd]
    for nothing in (tmp_path / "*.csv", tmp_path / "none.jsonl"):
        assert expand(nothing) == [nothing]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert [error.code for report in validate([empty]) for error in report.errors] == ["is-a-folder"]


def test_shards_have_a_report_each_and_their_rows_together(tmp_path):
    folder = shards(tmp_path / "data")
    reports = validate([folder], "demonstration")
    assert [report.rows for report in reports] == [1, 3, 2]
    assert [places(report) for report in reports] == [[], [(2, "/completion", "empty-content")], []]
    with pytest.raises(PipelineError, match=r"1 of 6 rows are wrong"):
        load_rows(folder, "demonstration")
    (folder / "b.jsonl").write_bytes(LINES.replace(b'""', b'"x"'))
    checked = load_rows(folder, "demonstration")
    assert len(checked.rows) == checked.report.rows == checked.report.valid == 6
    assert len(checked.report.sha256) == 64
    assert checked.report.format == "standard-prompt-completion"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:HuggingFaceH4/ultrafeedback_binarized:train_prefs", ("HuggingFaceH4/ultrafeedback_binarized", None)),
        ("hf:a/b:config:train_prefs", ("a/b", "config")),
        ("hf:./folder:train_prefs", ("./folder", None)),
    ],
)
def test_address_of_a_data_set(text, expected):
    assert address(text) == (*expected, "train_prefs")


def test_address_with_a_cut_split():
    assert address("hf:a/b:train[10:20]") == ("a/b", None, "train[10:20]")
    for wrong in ("hf:a/b", "hf:", "hf:a/b:", "hf:a:b:c:d"):
        with pytest.raises(DatasetError):
            address(wrong)


HUB = """
import json, sys
from pathlib import Path
from pipeline.data.check import check_file, load_rows
report = check_file(Path(sys.argv[1]))
ok = load_rows(Path(sys.argv[1] + "[:1]"), "preference").rows if report.rows else []
print(json.dumps([report.as_dict(), [row.chosen for row in ok], len(report.sha256)]))
"""


def in_offline_process(tmp_path, name):
    """`datasets` reads these when it is imported, and writes to its cache."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", HUB, name], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_data_set_in_a_local_folder(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    parquet(folder / "train.parquet", PAIRS)
    report, chosen, digits = in_offline_process(tmp_path, "hf:./pairs:train")
    assert [(error["line"], error["pointer"], error["code"]) for error in report["errors"]] == [
        (None, "/1/chosen", "empty-content"),
        (None, "/2/rejected", "nul-character"),
    ]
    assert (report["file"], report["rows"], chosen, digits) == ("hf:./pairs:train", 3, ["b"], 64)


def test_data_set_that_cannot_be_had(tmp_path):
    report, _, digits = in_offline_process(tmp_path, "hf:nobody/nothing:train")
    assert [error["code"] for error in report["errors"]] == ["unreadable-dataset"]
    assert (report["rows"], digits) == (0, 0)


MAGIC = [b"", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(MAGIC), st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.csv", "x.tsv.gz"]))
def test_any_bytes_give_a_report(tmp_path_factory, magic, data, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(magic + data)
    report = check_file(path, max_errors=5)
    json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False).encode()
    assert report.ok == (report.error_count == 0)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_damage_gives_a_report(tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp()
    table = parquet(base / "good.parquet", PAIRS).read_bytes()
    pa.feather.write_feather(pa.Table.from_pylist(PAIRS), base / "good.arrow", compression="uncompressed")
    arrow = (base / "good.arrow").read_bytes()
    good = data.draw(st.sampled_from([table, arrow, PACK[".gz"](LINES), PACK[".zst"](LINES), CSV]))
    at = data.draw(st.integers(0, len(good)))
    path = base / ("damaged.csv" if good is CSV else "damaged")
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 9)) :])
    report = check_file(path, max_errors=5)
    json.dumps(report.as_dict(), ensure_ascii=False, allow_nan=False).encode()
