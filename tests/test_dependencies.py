"""What is imported is declared, and what is declared is needed: an installation has all of it, and no more."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BY_OTHERS = {
    "accelerate": "Transformers' Trainer",
    "tensorboard": "torch.utils.tensorboard",
}
"""Imported by a library that does not depend on it by itself."""
TOOLS = {"build", "mypy", "pip-audit", "ruff", "types-jsonschema", "types-pyyaml"}
"""Run and not imported."""


def named(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", one)[0].lower().replace("_", "-") for one in requirements}


def imported(folder: str) -> set[str]:
    """The distributions that the modules in a folder import; its own modules and the package's are none."""
    files = list((ROOT / folder).rglob("*.py"))
    ours = {file.stem for file in (ROOT / "scripts").iterdir()}  # its modules, and its packages
    own = {"pipeline", "tests", *ours, *sys.stdlib_module_names}
    known = packages_distributions()
    modules = {name.partition(".")[0] for file in files for name in modules_of(file)} - own
    return {one.lower().replace("_", "-") for module in modules for one in known.get(module, [module])}


def modules_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEEDED = named(PROJECT["project"]["dependencies"])
OPTIONAL = named([one for extra in PROJECT["project"]["optional-dependencies"].values() for one in extra])
DEV = named(PROJECT["dependency-groups"]["dev"])


def test_what_the_package_imports_is_declared() -> None:
    assert imported("pipeline") - OPTIONAL == NEEDED - BY_OTHERS.keys()
    assert imported("pipeline") >= OPTIONAL - BY_OTHERS.keys()


def test_what_scripts_and_tests_import_is_declared() -> None:
    used = imported("scripts") | imported("tests")
    assert used - NEEDED - OPTIONAL - DEV == set()
    assert DEV - used == TOOLS


def test_all_of_it_is_pinned() -> None:
    pinned = named([line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line])
    assert (NEEDED | DEV) - pinned == set()
