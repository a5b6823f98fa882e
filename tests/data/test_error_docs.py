"""The page of codes is the one that the code gives, every code is on it, and each of its examples is one."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

from pipeline.data.check import check_file
from pipeline.data.codes import MENDS, TOKEN_MENDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
EXAMPLES, SCENES = PAGE["EXAMPLES"], PAGE["SCENES"]
TOKEN_SCENES, COMMAND_SCENES = PAGE["TOKEN_SCENES"], PAGE["COMMAND_SCENES"]
NAMED_ELSEWHERE = {"missing-key"}
"""Of an experiment that names no data, which the experiment's own errors are about."""


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
    assert EXAMPLES.keys() | SCENES.keys() == MENDS.keys()
    assert not EXAMPLES.keys() & SCENES.keys()
    assert TOKEN_SCENES.keys() == TOKEN_MENDS.keys()


def raised(path):
    """The codes that a module of the package writes out: `code="…"`, and what its findings begin with."""
    makers = {"Finding": 0, "_Found": 0, "_error": 0, "warn": 0, "TableError": None}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        given = [word.value for word in node.keywords if word.arg == "code"]
        if makers.get(name) is not None and node.args:
            given.append(node.args[makers[name]])
        yield from (one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_every_code_that_is_raised_for_data_is_documented():
    files = [*(ROOT / "pipeline" / "data").rglob("*.py")]
    files += [ROOT / "pipeline" / name for name in ("validation.py", "token_check.py", "inspection.py")]
    found = {code for file in files for code in raised(file)}
    assert len(found) > 60
    documented = MENDS.keys() | TOKEN_MENDS.keys() | COMMAND_SCENES.keys() | NAMED_ELSEWHERE
    assert found - documented == set()
    assert COMMAND_SCENES.keys() <= found


@pytest.mark.skipif(sys.platform != "linux", reason="some messages are the operating system's")
def test_the_page_is_up_to_date():
    """Every example on it is played: what the page says that the package says, it does."""
    assert (ROOT / "docs" / "data-errors.md").read_text(encoding="utf-8") == PAGE["data_errors"]()
