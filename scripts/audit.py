"""Holds what is pinned in requirements.lock against the published advisories, by pip-audit.

Fails on a vulnerability that has a fix: then a newer version is to be pinned. One without a fix is shown. Where the
advisories cannot be reached, it says that nothing was audited, and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 120.0


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
        why = (complaint.strip() or "pip-audit wrote nothing").splitlines()[-1][:200]
        return Verdict(False, [f"audit: NOTHING WAS AUDITED: {why}"])
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


def main() -> int:
    """Audits the pinned set; 1 where a vulnerability has a fix."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "requirements.lock")]
    command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        verdict = judge(done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        verdict = judge("", f"no answer from the advisories within {_SECONDS:g} s")
    print("\n".join(verdict.lines))
    return int(verdict.failed)


if __name__ == "__main__":
    sys.exit(main())
