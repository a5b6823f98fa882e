"""The examples of docs/data-formats.md: each becomes what the page says."""

import json
import re
from pathlib import Path

import pytest

from pipeline.data.check import check_file, load_rows
from pipeline.data.columns import FIELDS
from pipeline.data.convert import _CONVERTERS
from pipeline.data.export import canonical

PAGE = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"### (.*?)\n.*?```json\n(.*?)```\n\nBecomes:\n\n```json\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("heading", "given", "expected"), EXAMPLES, ids=[heading for heading, *_ in EXAMPLES])
def test_example_becomes_what_the_page_says(tmp_path, heading, given, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(given)))
    report = check_file(path)
    assert report.errors == []
    assert f"`{report.format}`" in heading
    (row,) = load_rows(path, report.kind).rows
    assert canonical(row) == json.loads(expected)


def test_every_format_is_on_the_page():
    assert len(EXAMPLES) == PAGE.count("\n### ")
    named = {name for heading, *_ in EXAMPLES for name in re.findall(r"`(.*?)`", heading)}
    assert named == set(_CONVERTERS)


def test_every_field_is_on_the_page():
    assert all(f'"{field}"' in PAGE or f"`{field}`" in PAGE for field in FIELDS)
