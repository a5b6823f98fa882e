"""The page of codes is the one that the code gives, and each of its examples is one."""

import runpy
from pathlib import Path

import pytest

from pipeline.data.check import check_file
from pipeline.data.codes import MENDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
EXAMPLES, TOLD = PAGE["EXAMPLES"], PAGE["TOLD"]


def codes(path, text, kind):
    path.write_text(text, encoding="utf-8")
    report = check_file(path, kind, near=True)
    return set(report.error_counts), {*report.error_counts, *report.warning_counts}


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_has_the_error_and_is_mended(tmp_path, code):
    wrong, mended, kind = EXAMPLES[code]
    assert code in codes(tmp_path / "rows.jsonl", wrong, kind)[1]
    errors, found = codes(tmp_path / "rows.jsonl", mended, kind)
    assert errors == set()
    assert code not in found


def test_every_code_is_on_the_page():
    assert EXAMPLES.keys() | TOLD.keys() == MENDS.keys()
    assert not EXAMPLES.keys() & TOLD.keys()


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "data-errors.md").read_text(encoding="utf-8") == PAGE["data_errors"]()
