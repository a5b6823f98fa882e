"""What the audit of the pinned packages decides, on output in pip-audit's form, and through pip-audit itself."""

from __future__ import annotations

import json
import sys
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
    verdict = audit.judge(output, "WARNING: old\nConnectionError: the service cannot be reached\n")
    assert not verdict.failed
    assert verdict.lines == ["audit: NOTHING WAS AUDITED: ConnectionError: the service cannot be reached"]


STAND_IN = """
import json, re, runpy, sys
import requests

answers = json.loads(sys.argv.pop(1))

def get(session, url, timeout):
    name = re.fullmatch(r"https://pypi[.]org/pypi/(.*)/.*/json", url)[1]
    answer = answers.get(name, answers["others"])
    if isinstance(answer, str):
        raise vars(requests.exceptions)[answer](
            "HTTPSConnectionPool(host='pypi.org'): Max retries exceeded (Caused by NameError_('no such host'))"
        )
    response = requests.Response()
    response.status_code, response.url, response.reason = answer["status"], url, "Some Reason"
    response._content = json.dumps({"info": {}, "vulnerabilities": answer.get("vulnerabilities", [])}).encode()
    return response

requests.Session.get = get
runpy.run_module("pip_audit", run_name="__main__")
"""
"""pip-audit itself, with the index's answers in place of the network."""
WELL: dict[str, Any] = {"status": 200}


def jinja2(*fixes: str, withdrawn: str | None = None) -> dict[str, Any]:
    """The index's answer for a package with a vulnerability, with all keys that it has."""
    bad = {
        "aliases": ["CVE-2099-1"],
        "details": "bad\nand worse",
        "fixed_in": list(fixes),
        "id": "PYSEC-2099-1",
        "link": "https://osv.dev/vulnerability/PYSEC-2099-1",
        "source": "osv",
        "summary": None,
        "withdrawn": withdrawn,
    }
    return {"others": WELL, "jinja2": {"status": 200, "vulnerabilities": [bad]}}


@pytest.mark.parametrize(
    ("answers", "code", "line"),
    [
        (jinja2("99.1", "99.0.1"), 1, "audit: jinja2 3.1.6: PYSEC-2099-1, fixed in 99.0.1, 99.1"),
        (jinja2(), 0, "audit: jinja2 3.1.6: PYSEC-2099-1, no fix yet"),
        (
            jinja2("99.1", withdrawn="2099-01-01T00:00:00Z"),
            0,
            "audit: ALL packages, 0 vulnerabilities, 0 of them with a fix",
        ),
        (
            {"others": {"status": 404}},
            0,
            "audit: NOTHING WAS AUDITED: the advisories know none of ALL packages, such as: Dependency not found",
        ),
        ({"others": {"status": 503}}, 0, "audit: NOTHING WAS AUDITED: requests.exceptions.HTTPError: 503 Server Error"),
        ({"others": "ConnectTimeout"}, 0, "audit: NOTHING WAS AUDITED: Could not connect to PyPI's vulnerability feed"),
        ({"others": "ConnectionError"}, 0, "audit: NOTHING WAS AUDITED: NameError_('no such host')"),
    ],
    ids=["mendable", "no-fix", "withdrawn", "unknown", "broken", "slow", "no-network"],
)
def test_the_whole_lock_goes_through_pip_audit(
    audit: Any,
    answers: dict[str, Any],
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(audit, "_PIP_AUDIT", [sys.executable, "-c", STAND_IN, json.dumps(answers)])
    assert audit.main() == code
    pins = [pin for pin in audit.LOCK.read_text().splitlines() if not pin.startswith("#")]
    assert line.replace("ALL", str(len(pins))) in capsys.readouterr().out


def test_ci_runs_it() -> None:
    assert "scripts/audit.py" in (ROOT / ".ci/run").read_text()
