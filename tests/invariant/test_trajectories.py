"""The real command on each class of path, held step by step to what stock TRL logged of the same training.

`scripts/record_trajectories.py` made the record, in the environment that stands beside each. What may lie between:

- exact: the order of float32 sums, which differs between processors too.
- recurrent: the same, in models whose layers hand a state from token to token, and its rounding with it.
- rounded: gradients from bfloat16 factors, where the processor multiplies bfloat16; elsewhere it is as exact. Adam
  divides a gradient by its own size, so that small ones step as far as large ones, and their noise with them.

A token accuracy may differ by one token of a step. Rates are arithmetic.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import main
from tests.invariant.trajectories import (
    CASES,
    LIBRARIES,
    LORA,
    OPENED_RATE,
    RATES,
    RECORDED,
    RHYTHM,
    SEED,
    Case,
    save_base,
    save_start,
    write_rows,
)

ROOT = Path(__file__).parents[2]
AGAIN = "OMP_NUM_THREADS=1 python scripts/record_trajectories.py"
TOLERANCES = {
    "exact": {"loss": 1e-5, "rewards/margins": 2e-5, "grad_norm": 5e-5, "mean_token_accuracy": 1 / 100},
    "recurrent": {"loss": 2e-4, "rewards/margins": 5e-4, "grad_norm": 5e-3, "mean_token_accuracy": 1 / 100},
    "rounded": {"loss": 5e-3, "rewards/margins": 5e-3, "grad_norm": 2e-2, "mean_token_accuracy": 1 / 100},
}
"""Of the gradient norm a share, else absolute."""


def run_case(case: Case, folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains a case by the real command.

    Returns:
        The logged steps, and the manifest.
    """
    base = save_base(folder / "base", case)
    write_rows(folder / "rows.jsonl", case)
    unfreeze = {"last_blocks": case.opened, "final_norm": True, "lm_head": case.head, "learning_rate": OPENED_RATE}
    stage = {
        "learning_rate": RATES[case.stage],
        **RHYTHM,
        **case.settings,
        "eval_strategy": "no",
        "save_strategy": "no",
        **({"unfreeze": unfreeze} if case.opened else {}),
        **({"adapter": case.adapter} if case.stage == "dpo" else {}),
        **changes,
    }
    kind = "demonstrations" if case.stage == "sft" else "preferences"
    experiment = {
        "name": "recorded",
        "seed": SEED,
        "model": {"id": str(base), "device": "cpu"},
        "data": {kind: {"train": str(folder / "rows.jsonl")}},
        "scope": {"lora": {**LORA, "layers": case.layers}},
        case.stage: stage,
        "engine": {"precision": case.precision},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    start = ["--from", str(save_start(folder / "start", base, case))] if case.stage == "dpo" else []
    where = ["--checkpoints", str(folder / "runs")]
    assert main([case.stage, str(folder / "experiment.yaml"), *where, *start]) == 0
    run = folder / "runs" / "recorded" / f"{case.stage}-001"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], json.loads((run / "run.json").read_text(encoding="utf-8"))


def hold(name: str, steps: list[dict[str, Any]], figures: tuple[str, ...] | None = None) -> dict[str, float]:
    """Holds logged steps to the record of a class.

    Args:
        name: of the class.
        steps: what was logged.
        figures: those that are compared, besides the rates; None: all.

    Returns:
        The largest difference of each figure.

    Raises:
        AssertionError: they differ; with both environments, and how the record is made again.
    """
    record = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    assert len(steps) == len(record["steps"]) > 1
    apart: dict[str, float] = {}
    for mine, theirs in zip(steps, record["steps"], strict=True):
        rates = [mine[key] for key in ("learning_rate", "learning_rate/opened") if key in mine]
        if len(theirs["learning_rates"]) < len(rates):
            rates = rates[:1]  # opened weights alone: both names say the one rate
        assert rates == pytest.approx(theirs["learning_rates"], rel=1e-6), f"rates of step {mine['step']}"
        for figure in figures or theirs.keys() - {"learning_rates"}:
            by = abs(mine[figure] - theirs[figure]) / (theirs[figure] if figure == "grad_norm" else 1)
            apart[figure] = max(apart.get(figure, 0.0), by)
    allowed = TOLERANCES[CASES[name].tolerance]
    beyond = {figure: by for figure, by in apart.items() if not by <= allowed[figure]}
    here = {library: version(library) for library in LIBRARIES}
    assert not beyond, (
        f"{name}: {beyond} apart from stock TRL as recorded with {record['environment']}; here {here}. Where libraries "
        f"have changed, `{AGAIN}` trains on stock TRL again and writes the record; the commit says why"
    )
    return apart


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("name", CASES)
def test_the_command_follows_stock_trl(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    steps, manifest = run_case(case, tmp_path)
    engine = manifest["engine"]
    taken = {**engine, "trunk": engine["trunk"] and engine["trunk"]["blocks"]} if "trunk" in engine else engine
    assert {key: taken[key] for key in case.path} == case.path, engine
    hold(name, steps)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_script_writes_what_is_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock TRL again, in this process: within what float32 allows, whatever the processor."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import record_trajectories

    steps = record_trajectories.record(CASES[name], tmp_path)
    hold(name, [{**step, "step": at, "learning_rate": step["learning_rates"][0]} for at, step in enumerate(steps, 1)])


def test_the_record_is_of_the_pinned_libraries() -> None:
    """A record of other versions is stale, also where its figures still fit."""
    pinned = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split("\n") if "==" in line)
    records = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert list(records) == list(CASES)
    for name, record in records.items():
        for library in LIBRARIES:
            made = record["environment"][library].split("+")[0]
            assert made == pinned[library].split()[0], f"{name} was recorded with {library} {made}; write it: `{AGAIN}`"


@pytest.mark.parametrize("file", ["scripts/record_trajectories.py", "tests/invariant/trajectories.py", "tests/tiny.py"])
def test_nothing_of_the_project_makes_a_record(file: str) -> None:
    assert not re.search(r"^\s*(from|import) pipeline\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
