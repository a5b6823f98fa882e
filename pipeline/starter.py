"""What `pipeline init DIR` writes: the recipes, the example data and the schema that editors complete from.

The files are the package's own, byte for byte, in the same layout, so that the recipes' relative paths hold.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from pipeline.errors import ExitCode, PipelineError

_GITIGNORE = b"/checkpoints/\n/.venv/\n"


def write_starter(directory: Path) -> list[Path]:
    """Writes the starter files under `directory`, which is made if need be: all of them, or none.

    Returns:
        What was written, sorted. A `.gitignore` is among it unless there was one.

    Raises:
        PipelineError: where a file is already there, or `directory` cannot be written.
    """
    files = _starter_files()
    try:
        if not os.path.lexists(directory / ".gitignore"):
            files[".gitignore"] = _GITIGNORE
        _refuse_what_is_there(directory, sorted(files))
        return _place(directory, files)
    except OSError as error:
        raise PipelineError(
            f"cannot write the starter files: {error.strerror}",
            code="not-writable",
            mend="name a folder that you may write, on a disk with a few megabytes left",
            file=error.filename or directory,
            exit_code=ExitCode.MACHINE,
        ) from None


def _starter_files() -> dict[str, bytes]:
    """The content of each file by its path under the folder, with `/`."""
    package = resources.files("pipeline")
    schema = "schemas/experiment.schema.json"
    found = {schema: package.joinpath(schema).read_bytes()}
    for folder, ending in (("recipes", ".yaml"), ("datasets/triage", "")):
        for entry in package.joinpath(folder).iterdir():
            if entry.is_file() and entry.name.endswith(ending) and not entry.name.startswith("."):
                found[f"{folder}/{entry.name}"] = entry.read_bytes()
    return found


def _refuse_what_is_there(directory: Path, names: list[str]) -> None:
    """Raises where writing would replace a file, or need a folder where a file stands."""
    if os.path.lexists(directory) and not directory.is_dir():
        raise PipelineError(
            "there is a file of this name", code="file-exists", mend="name another folder", file=directory
        )
    taken = [name for name in names if os.path.lexists(directory / name)]
    parents = {parent for name in names for parent in Path(name).parents}
    taken += [
        str(parent)
        for parent in sorted(parents)
        if os.path.lexists(directory / parent) and not (directory / parent).is_dir()
    ]
    if taken:
        raise PipelineError(
            f"already there: {', '.join(taken)}",
            code="file-exists",
            mend="name another folder, or move these files away; nothing was written",
            file=directory,
        )


def _place(directory: Path, files: dict[str, bytes]) -> list[Path]:
    """Writes all files beside their places, then renames each into its own; on failure, takes them back."""
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".pipeline-init-", dir=directory))
    placed: list[Path] = []
    try:
        for name, content in files.items():
            staged = stage / name
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(content)
        for name in sorted(files):
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (stage / name).rename(target)
            placed.append(target)
    except OSError:
        for target in placed:
            target.unlink()
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return placed
