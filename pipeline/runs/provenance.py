"""What a manifest records of the machine and the code: versions, git commit, command line."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.redaction import hide

_LIBRARIES = (
    "preference-pipeline",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "wandb",
    "numpy",
)


def provenance(argv: list[str] | None = None) -> dict[str, Any]:
    """`argv`, with no secret in it, `git` and `versions` for the manifest."""
    given = sys.argv if argv is None else argv
    return {"argv": [hide(argument) for argument in given], "git": _git(Path.cwd()), "versions": _versions()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return versions


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a repository."""

    def ask(*arguments: str) -> str:
        answer = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return answer.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
