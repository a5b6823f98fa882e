"""`pipeline verify RUN`: the proof of a run repeated from the saved folders alone, and what has changed since."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipeline.data.check import load_rows
from pipeline.data.tokens import Pair
from pipeline.errors import PipelineError
from pipeline.evaluation.preference import pair_logps
from pipeline.experiment import Data, Experiment
from pipeline.model.adapter import attached, hashes_of
from pipeline.model.base import load_base, template_sha256, tokenizer_sha256
from pipeline.model.ground import Ground, prepare_ground, quiet_libraries
from pipeline.runs.files import ADAPTER_CONFIG
from pipeline.runs.run import Run
from pipeline.training.engine.precision import Products, multiplication
from pipeline.training.proof import PROOF, reference_hash
from pipeline.training.start import find_adapter
from pipeline.training.tolerance import tolerance_for


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    message: str


def verify_run(run: Run, experiment: Experiment, root: Path, console: Console) -> list[Finding]:
    """Looks at everything that a finished run rests on, and scores its proof's pairs again.

    Args:
        run: a finished run of either stage.
        experiment: its resolved experiment.
        root: where runs live; the SFT run that a DPO run started from is found there.
        console: where progress is shown.

    Raises:
        PipelineError: the run is not finished, or its base is not to be had.
    """
    if run.status != "finished":
        raise PipelineError(
            f"{run.name} is {run.status}, so there is nothing to verify",
            code="no-finished-run",
            file=run.path,
            mend="name a finished run",
        )
    quiet_libraries()
    ground = prepare_ground(experiment, console.print)
    manifest = run.manifest
    findings = [
        _same("base weights", manifest["base"]["sha256"], ground.base_sha256),
        _same("tokenizer", manifest["tokenizer"]["sha256"], tokenizer_sha256(ground.tokenizer)),
        _same("chat template", manifest["tokenizer"]["template_sha256"], template_sha256(ground.tokenizer)),
        _same_adapter("adapter", manifest["adapter"], _hashes(run.adapter)),
        _files(run),
        *[_data(entry, experiment.data) for entry in manifest["data"]],
        _versions(manifest["versions"]),
    ]
    if run.stage == "dpo":
        with multiplication(experiment.engine.precision, ground.placement.device) as products:
            findings += _reference(run, experiment, ground, root, products)
    return findings


def as_dict(run: Run, findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON; `ok` is whether every one holds."""
    return {
        "ok": all(finding.ok for finding in findings),
        "run": str(run.path),
        "findings": [asdict(finding) for finding in findings],
        "reference": run.manifest.get("reference"),
    }


def _files(run: Run) -> Finding:
    """Every file that the run listed is as it was; what was added since (a comparison, a report) is none of them."""
    listed, now = run.manifest.get("files", {}), run.files()
    changed = [f"{name} {'differs' if name in now else 'is gone'}" for name in listed if now.get(name) != listed[name]]
    return Finding("files", not changed, ", ".join(changed) or f"{len(listed)} unchanged")


def _same(name: str, then: str | None, this: str | None) -> Finding:
    if then == this:
        return Finding(name, True, "as the run recorded it")
    return Finding(name, False, f"changed since the run: {str(then)[:12]} then, {str(this)[:12]} now")


def _hashes(folder: Path) -> dict[str, str | None]:
    """`hashes_of` an adapter; None in place of each where it cannot be read."""
    try:
        return {**hashes_of(folder)}
    except (OSError, PipelineError):
        return {"sha256": None, "config_sha256": None}


def _same_adapter(name: str, then: dict[str, str], this: dict[str, str | None]) -> Finding:
    """Its weights first, then what its configuration makes of them."""
    if then["sha256"] != this["sha256"]:
        return _same(name, then["sha256"], this["sha256"])
    found = _same(name, then["config_sha256"], this["config_sha256"])
    return found if found.ok else Finding(name, False, f"{ADAPTER_CONFIG} {found.message}")


def _data(entry: dict[str, Any], data: Data) -> Finding:
    path, kind = entry["path"], entry["kind"]
    name = f"data {Path(path).name}"
    try:
        rows = load_rows(Path(path), kind, set_aside=True, columns=data.columns(path, kind))
    except PipelineError as error:
        return Finding(name, False, f"cannot be read as it was: {error.message}")
    return _same(name, entry["sha256"], rows.report.sha256)


def _versions(then: dict[str, str | None]) -> Finding:
    """Other versions are said, and are no failure: whether they matter is what the scores show."""
    changed = []
    for name in ("torch", "transformers", "peft", "trl"):
        installed = version(name)
        if then.get(name) != installed:
            changed.append(f"{name} {then.get(name)} then, {installed} now")
    return Finding("library versions", True, "; ".join(changed) or "as the run recorded them")


def _reference(run: Run, experiment: Experiment, ground: Ground, root: Path, products: Products) -> list[Finding]:
    recorded = run.manifest["reference"]
    try:
        _, parent = find_adapter(root, str(run.manifest["parent"]))
    except PipelineError as error:
        return [Finding("reference adapter", False, error.message)]
    start = parent.adapter if isinstance(parent, Run) else parent
    tolerance = tolerance_for(ground.placement.dtype, experiment.model.quantize, rounds=products.round)
    hashes = _hashes(start)
    named = reference_hash(ground.base_sha256, hashes, template_sha256(ground.tokenizer))
    findings = [
        _same_adapter("reference adapter", {key: recorded[f"adapter_{key}"] for key in hashes}, hashes),
        _same("reference hash", recorded["hash"], named),
        Finding("reference drift in training", recorded["drift"] <= tolerance.drift, f"{recorded['drift']:g} nats"),
    ]
    kept = json.loads((run.path / PROOF).read_text(encoding="utf-8"))["pairs"]
    pairs = [Pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in kept]
    base = load_base(ground.files, experiment.model, ground.placement)
    allowed = tolerance.start
    for name, folder, key in (("policy", run.adapter, "policy"), ("reference", start, "reference")):
        try:
            with attached(base, folder) as model:
                scored = torch.stack(pair_logps(model, pairs), dim=1)
        except PipelineError as error:
            findings.append(Finding(f"{name} log-probabilities", False, error.message))
            continue
        apart = float((scored - torch.tensor([row[key] for row in kept])).abs().max())
        message = f"{apart:.2g} nats from the run's on {len(pairs)} pairs (allowed {allowed:g})"
        findings.append(Finding(f"{name} log-probabilities", apart <= allowed, message))
    return findings
