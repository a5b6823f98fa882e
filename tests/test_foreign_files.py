"""What is read from outside, held against the source itself: no pickle, no torch file but our own, no code unasked."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.experiment_file import load_experiment
from pipeline.model.ground import prepare_ground
from pipeline.training.account import manifest_of

PACKAGE = Path(__file__).resolve().parents[1] / "pipeline"
READERS = {"dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(source: str) -> list[str]:
    """Imports of what reads pickles, and calls that load code or pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in READERS]
        # `pickle` itself is named for its exceptions alone.
        found += ["pickle"] if isinstance(node, ast.ImportFrom) and node.module == "pickle" else []
    for name, call in calls(source):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(ast.unparse(call))
        if given.get("trust_remote_code") == "True" or given.get("allow_pickle") == "True":
            found.append(ast.unparse(call))
        # Not told, Transformers asks at the terminal. `None` is a `**`.
        if re.fullmatch(r"Auto\w+\.from_pretrained", name) and not {"trust_remote_code", None} & given.keys():
            found.append(ast.unparse(call))
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load") or name.startswith("pickle."):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(stream)",
        "pickle.Unpickler(stream).load()",
        "from pickle import loads",
        "from dill import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x)",
        "numpy.load(x, allow_pickle=True)",
        "yaml.load(x)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert unsafe(source)


def test_nothing_in_the_package_reads_pickles_or_runs_what_it_reads() -> None:
    found = {str(file): unsafe(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    assert len(found) > 100
    assert {name: some for name, some in found.items() if some} == {}


def test_the_one_torch_file_is_opened_after_its_hash_held() -> None:
    """`keeper.py` opens a checkpoint's, which `find_checkpoint` has held against its manifest before."""
    loading = [
        file.name
        for file in PACKAGE.rglob("*.py")
        for name, _ in calls(file.read_text(encoding="utf-8"))
        if name == "torch.load"
    ]
    assert loading == ["keeper.py"]


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_that_may_bring_code_is_recorded_as_such(
    write_experiment: Callable[..., Path], tiny_folder: Path, asked: bool
) -> None:
    path = write_experiment(model={"id": str(tiny_folder), "device": "cpu", "trust_remote_code": asked})
    experiment = load_experiment(path).experiment
    manifest: dict[str, Any] = manifest_of(experiment, prepare_ground(experiment, lambda _: None), [])
    assert manifest["base"]["trust_remote_code"] is asked
