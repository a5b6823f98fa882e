"""Gathers what the page says, and writes it as one HTML file that asks nothing of the network.

The file carries its style, its script and uPlot. Its content security policy allows no request at all, and no script
but that one, by its hash: text from data and models is escaped by the template, and could not run if it were not.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import __version__
from pipeline.errors import ExitCode, PipelineError
from pipeline.evaluation.harness import task_rows
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import read_comparison
from pipeline.evaluation.verdict import better
from pipeline.evaluation.wording import in_order, interval_text, is_share, metric_words, number_text
from pipeline.experiment_file import load_experiment
from pipeline.report.account import asked_of, data_of, environment_of, lineage_of, proof_of
from pipeline.report.answers import checks_in, prompts_of
from pipeline.report.curves import charts_of
from pipeline.report.loading import loading_code
from pipeline.report.margins import histograms, most_wrong
from pipeline.runs.differences import run_differences
from pipeline.runs.files import write_atomically
from pipeline.runs.listing import shown_value
from pipeline.runs.run import Run, find_run, now

REPORT = "report.html"
_ASSETS = Path(__file__).parent / "assets"
_PROMPT = [{"role": "user", "content": "Hello!"}]
"""What the code to load asks where nothing was compared."""


def write_report(runs: Sequence[Run], root: Path, out: Path | None = None) -> Path:
    """Writes the page about `runs` and the runs that they started from.

    Args:
        runs: at least one; the last one's folder gets the page.
        root: where runs live; parents are found there.
        out: another place for the page.

    Returns:
        The file.

    Raises:
        PipelineError: a record of a run is damaged, or the page cannot be written.
    """
    path = out if out is not None else runs[-1].path / REPORT
    page = render(runs, root)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise PipelineError(
            f"the report cannot be written: {error.strerror or error}",
            code="cannot-write",
            file=path,
            mend="name another place with --out, or free some space",
            exit_code=ExitCode.MACHINE,
        ) from error
    return path


def render(runs: Sequence[Run], root: Path) -> str:
    """The page as HTML.

    Raises:
        PipelineError: a record of a run is damaged.
    """
    chains = [_chain(run, root) for run in runs]
    shown = list({run.path.resolve(): run for chain in chains for run in chain}.values())
    compared = next((found for run in reversed(runs) if (found := read_comparison(run.path)) is not None), None)
    charts = charts_of(shown)
    script = "\n".join((_asset("uplot/uPlot.iife.min.js"), _asset("page.js")))
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        written=now(),
        style=_asset("uplot/uPlot.min.css") + _asset("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=shown,
        compared=compared,
        figures=None if compared is None else _figures(compared),
        tasks=None if compared is None else task_rows(compared),
        verdict=None if compared is None else _verdict(compared),
        health=[(run.path.name, run.manifest.get("health")) for run in shown],
        experiments=[_experiment(run, {one.stage for one in chain}) for run, chain in zip(runs, chains, strict=True)],
        differences=_differences(runs) if len(runs) > 1 else None,
        data=[entry for run in shown for entry in data_of(run)],
        charts=charts,
        chart_data=[chart.as_dict() for some in charts.values() for chart in some],
        **_margins(compared),
        prompts=[] if compared is None else prompts_of(compared),
        checks=[] if compared is None else [(name, metric_words(name)) for name in checks_in(compared)],
        proofs=[(run.path.name, rows) for run in shown if (rows := proof_of(run))],
        lineages=[lineage_of(chain) for chain in chains],
        environments=[(run.name, environment_of(run)) for run in shown],
        loading=[(run.name, _loading(run, compared)) for run in runs if run.status == "finished"],
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _chain(run: Run, root: Path) -> list[Run]:
    """The run behind those it started from, as far as they are still there."""
    chain = [run]
    while (parent := chain[0].manifest.get("parent")) is not None:
        try:
            found = find_run(root, str(parent))
        except PipelineError:
            break
        if not isinstance(found, Run):
            break
        chain.insert(0, found)
    return chain


def _experiment(run: Run, stages: set[str]) -> tuple[str, list[tuple[str, str]]]:
    experiment = load_experiment(run.path / "experiment.yaml").experiment
    return run.name, asked_of(experiment, stages)


def _differences(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    parts = run_differences(runs)
    return {
        part: {key: [shown_value(value) for value in values] for key, values in rows.items()}
        for part, rows in parts.items()
        if rows
    }


def _verdict(compared: Mapping[str, Any]) -> dict[str, Any] | None:
    verdict = compared.get("verdict")
    if verdict is None:
        return None
    sides = {
        word: [(other, [metric_words(name) for name in names]) for other, names in verdict[key].items() if names]
        for word, key in (("better", "gains"), ("worse", "losses"))
    }
    return {**verdict, "sides": sides}


def _figures(compared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of metrics: a row for each, a cell for each model."""
    metrics, deltas = compared["metrics"], compared["deltas"]
    names = in_order(name for model in compared["models"] for name in metrics[model])
    rows = []
    for name in names:
        cells = [_cell(name, metrics[model].get(name), deltas.get(model, {}).get(name)) for model in compared["models"]]
        counts = sorted({metrics[model][name]["n"] for model in compared["models"] if name in metrics[model]})
        rows.append({"name": metric_words(name), "n": "/".join(map(str, counts)), "cells": cells})
    return rows


def _cell(name: str, value: Mapping[str, Any] | None, delta: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    estimate = Estimate(**value)
    cell: dict[str, Any] = {
        "value": number_text(estimate.value, name) + (" %" if is_share(name) else ""),
        "interval": interval_text(estimate, name),
        "bar": (100 * estimate.low, 100 * estimate.high, 100 * estimate.value) if is_share(name) else None,
        "delta": None,
    }
    if delta is not None:
        difference = Estimate(**delta)
        unit = " pt" if is_share(name) else ""
        cell["delta"] = f"{number_text(difference.value, name, '+')}{unit} {interval_text(difference, name, '+')}"
        cell["direction"] = better(name, difference)
    return cell


def _margins(compared: Mapping[str, Any] | None) -> dict[str, Any]:
    pairs = [] if compared is None else compared.get("pairs", [])
    drawn = histograms(pairs)
    # The last version with margins is the one that is judged: a DPO run stands behind its SFT run.
    model = drawn[-1].model if drawn else None
    return {
        "histograms": drawn,
        "judged": model,
        "wrong": [] if model is None else most_wrong(pairs, model),
        "number_of_pairs": len(pairs),
    }


def _loading(run: Run, compared: Mapping[str, Any] | None) -> str:
    experiment = load_experiment(run.path / "experiment.yaml").experiment
    samples = [] if compared is None else compared["samples"]
    return loading_code(run, experiment, samples[0]["prompt"] if samples else _PROMPT)
