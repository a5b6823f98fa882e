"""The user's cache: what can be made again, and is kept because that takes time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pipeline.errors import ExitCode, PipelineError
from pipeline.model.builtin import cache_directory

Kind = Literal["models", "references"]
KINDS: tuple[Kind, ...] = ("models", "references")
_WHAT = {"models": "converted built-in models", "references": "log-probabilities of frozen references"}
KEY = "key.json"
"""In the folder of a reference: what its log-probabilities depend on, beside the token ids."""


def folder_of(kind: Kind) -> Path:
    """Where one kind of content lies."""
    return cache_directory() / kind


def list_cache() -> list[dict[str, Any]]:
    """Every model and reference in the cache: `kind`, `path`, `bytes`, and a reference's `key`."""
    entries = []
    for kind in KINDS:
        folder = folder_of(kind)
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            files = [file for file in path.rglob("*") if file.is_file()]
            entry: dict[str, Any] = {
                "kind": kind,
                "path": str(path),
                "bytes": sum(file.stat().st_size for file in files),
            }
            if (path / KEY).is_file():
                entry["key"] = json.loads((path / KEY).read_text(encoding="utf-8"))
            entries.append(entry)
    return entries


def clear_cache(kinds: list[Kind]) -> None:
    """Removes whole kinds of content.

    Raises:
        PipelineError: a file cannot be removed.
    """
    for kind in kinds:
        try:
            shutil.rmtree(folder_of(kind))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise PipelineError(
                f"the cache cannot be cleared: {error.strerror}",
                code="cannot-write",
                file=error.filename,
                mend="see who owns the file, or remove the folder by hand",
                exit_code=ExitCode.MACHINE,
            ) from error


def print_cache(entries: list[dict[str, Any]], console: Console) -> None:
    """A line for each entry, and the sum."""
    table = Table(box=None, pad_edge=False)
    for heading in ("what", "MiB", "of", "folder"):
        table.add_column(heading, justify="right" if heading == "MiB" else "left")
    for entry in entries:
        key = entry.get("key", {})
        of = f"adapter {key['adapter_sha256'][:12]}, {key['precision']}" if key else ""
        table.add_row(entry["kind"], f"{entry['bytes'] / 2**20:,.1f}", of, entry["path"])
    console.print(table if entries else f"nothing is kept in {cache_directory()}", highlight=False)
    for kind in sorted({entry["kind"] for entry in entries}):
        size = sum(entry["bytes"] for entry in entries if entry["kind"] == kind)
        console.print(
            f"{kind}: {_WHAT[kind]}, {size / 2**20:,.1f} MiB; `pipeline cache --clear {kind}`", highlight=False
        )
