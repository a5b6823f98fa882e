"""What the audit of the pinned packages decides, on output in the form that pip-audit's documentation gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {"name": "attrs", "version": "26.1.0", "vulns": []}
SKIPPED = {"name": "ours", "skip_reason": "Dependency not found on PyPI and could not be audited: ours (0.1.0)"}


def package(*fixes: str) -> dict[str, Any]:
    vulnerability = {"id": "PYSEC-2099-1", "fix_versions": list(fixes), "aliases": [], "description": "bad"}
    return {"name": "flask", "version": "0.5", "vulns": [vulnerability]}


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import audit

    return audit


@pytest.mark.parametrize(
    ("dependencies", "failed", "line"),
    [
        ([CLEAN], False, "audit: 1 packages, 0 vulnerabilities, 0 of them with a fix"),
        ([CLEAN, package("1.0", "0.12.3")], True, "audit: flask 0.5: PYSEC-2099-1, fixed in 1.0, 0.12.3"),
        ([CLEAN, package()], False, "audit: flask 0.5: PYSEC-2099-1, no fix yet"),
        ([CLEAN, SKIPPED], False, f"audit: ours was not audited: {SKIPPED['skip_reason']}"),
    ],
    ids=["clean", "mendable", "no-fix", "skipped"],
)
def test_only_what_can_be_mended_fails(audit: Any, dependencies: list[Any], failed: bool, line: str) -> None:
    verdict = audit.judge(json.dumps({"dependencies": dependencies, "fixes": []}), "Found 1 known vulnerability")
    assert verdict.failed is failed
    assert line in verdict.lines


@pytest.mark.parametrize("output", ["", "<html>", "[]", '{"dependencies": 3}', '{"dependencies": [{"name": "x"}]}'])
def test_no_answer_is_said_and_is_no_clean_bill(audit: Any, output: str) -> None:
    verdict = audit.judge(output, "ERROR: trouble\nConnectionError: the service cannot be reached\n")
    assert not verdict.failed
    assert verdict.lines == ["audit: NOTHING WAS AUDITED: ConnectionError: the service cannot be reached"]


def test_ci_runs_it() -> None:
    assert "scripts/audit.py" in (ROOT / ".ci/run").read_text()
