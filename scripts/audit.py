"""Holds what is pinned in requirements.lock against the published advisories, by pip-audit.

Fails on a vulnerability that has a fix: then a newer version is to be pinned. One without a fix is shown. Where the
advisories cannot be reached, or know none of the packages, it says that nothing was audited, and does not fail.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
_PIP_AUDIT = [sys.executable, "-m", "pip_audit"]
_SECONDS = 120.0
"""For all packages, one request each."""
_ANSWER_SECONDS = 10
"""For one of them; the first that gets no answer ends the audit."""


@dataclass(frozen=True)
class Verdict:
    """What one audit comes to."""

    failed: bool
    lines: list[str]


def judge(output: str, complaint: str) -> Verdict:
    """The verdict on what pip-audit wrote.

    Args:
        output: its JSON, on stdout; anything else where it did not come to a result.
        complaint: its stderr.
    """
    try:
        dependencies = json.loads(output)["dependencies"]
        audited = [one for one in dependencies if "skip_reason" not in one]
        found = [(one, vulnerability) for one in audited for vulnerability in one["vulns"]]
    except (ValueError, KeyError, TypeError):
        return _nothing(_cause(complaint))
    if not audited:  # an index of packages without advisories answers so
        why = f", such as: {dependencies[0]['skip_reason']}" if dependencies else ""
        return _nothing(f"the advisories know none of {len(dependencies)} packages{why}")
    lines, mended = [], 0
    for one, vulnerability in found:
        fixes = vulnerability["fix_versions"]
        mended += bool(fixes)
        how = f"fixed in {', '.join(fixes)}" if fixes else "no fix yet"
        lines.append(f"audit: {one['name']} {one['version']}: {vulnerability['id']}, {how}")
    lines += [
        f"audit: {one['name']} was not audited: {one['skip_reason']}" for one in dependencies if one not in audited
    ]
    lines.append(f"audit: {len(audited)} packages, {len(found)} vulnerabilities, {mended} of them with a fix")
    return Verdict(mended > 0, lines)


def _nothing(why: str) -> Verdict:
    return Verdict(False, [f"audit: NOTHING WAS AUDITED: {why[:300]}"])


def _cause(complaint: str) -> str:
    """The line of pip-audit's stderr that says what was in its way."""
    lines = complaint.strip().splitlines()
    logged = [line.split(":", 2)[-1] for line in lines if line.startswith("ERROR:")]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Timeout): \S", line)]
    # It logs what it expects, with a tip behind it; the rest ends as a traceback, the last exception sometimes bare.
    cause = (logged[:1] or raised[-1:] or lines[-1:] or ["pip-audit wrote nothing"])[0]
    below = re.search(r"\(Caused by (.*)\)$", cause)  # requests names what failed behind what it tried
    return below[1] if below else cause


def main() -> int:
    """Audits the pinned set; 1 where a vulnerability has a fix."""
    # The lock holds all there is, so nothing is left to resolve; without hashes pip-audit wants to be told so.
    command = [*_PIP_AUDIT, "--requirement", str(LOCK), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", str(_ANSWER_SECONDS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        verdict = judge(done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        verdict = judge("", f"no answer from the advisories within {_SECONDS:g} s")
    print("\n".join(verdict.lines))
    return int(verdict.failed)


if __name__ == "__main__":
    sys.exit(main())
