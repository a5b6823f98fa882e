"""What a case of the benchmark is, and how its sides are run and compared.

A case is a module with

    BATCH                                           rows of a step, unless more are asked for
    prepare(folder, data, rows) -> Work             in the parent: writes what the sides read to `folder`
    train(folder, side, precision, batch) -> dict   in a process of its own:
                                                    `{"seconds": {…}, "steps": [{metric: value}]}`

The model lies in `folder / BASE`. A side is one of SIDES; each runs in a process of its own, so that its peak memory is
its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = {
    "trl": "TRL as it comes, with gradient checkpointing",
    "trl-tuned": "TRL tuned: no checkpointing, reference precomputed",
    "ours": "this project",
}
METRICS = ("loss", "margin")
BASE = "base"


@dataclass(frozen=True)
class Work:
    """What every side of a case does."""

    rows: int
    tokens: int
    """All tokens of all epochs, as TRL lays them out without padding: a prompt counts for each completion."""
    flops: float
    """Floating-point operations that cannot be left out; a prompt counts once."""
    says: str
    """One line about the rows."""


def run_side(case: str, folder: Path, side: str, precision: str, batch: int) -> dict[str, Any]:
    """One side in a process of its own.

    Returns:
        What `train` of the case returned, and `peak_memory` in bytes.
    """
    result = folder / f"{side}-{batch}.json"
    script = Path(__file__).parent.parent / "benchmark.py"
    command = [sys.executable, str(script), case, "--folder", str(folder), "--side", side, "--precision", precision]
    command += ["--batch", str(batch), "--result", str(result)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def average(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean seconds and the largest memory of a side's runs; the steps of the first."""
    phases = runs[0]["seconds"]
    return {
        **runs[0],
        "seconds": {phase: sum(run["seconds"][phase] for run in runs) / len(runs) for phase in phases},
        "peak_memory": max(run["peak_memory"] for run in runs),
    }


def grow(
    case: str, folder: Path, precision: str, work: Work, batch: int, sides: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Ours on the same rows in batches of twice as many, and so on, until it takes more memory than TRL.

    Args:
        case: its name.
        folder: of the case.
        precision: ours.
        work: of the case.
        batch: with which the sides have run.
        sides: what they found.

    Returns:
        `batch_of_trl`; `batch_in_same_memory`, the largest of ours in the memory of TRL tuned, which keeps all
        activations as ours does; `batch_in_default_memory`, in that of TRL as it comes, which computes them again; None
        where not even TRL's batch is; and `peak_memory_by_batch` of those tried.
    """
    peaks = {batch: sides["ours"]["peak_memory"]}

    def largest(bound: int) -> int | None:
        return max((size for size, peak in peaks.items() if peak <= bound), default=None)

    tuned, default = (sides[name]["peak_memory"] for name in ("trl-tuned", "trl"))
    while peaks[batch] <= max(tuned, default) and 2 * batch <= work.rows:
        batch *= 2
        peaks[batch] = run_side(case, folder, "ours", precision, batch)["peak_memory"]
    return {
        "batch_of_trl": min(peaks),
        "batch_in_same_memory": largest(tuned),
        "batch_in_default_memory": largest(default),
        "peak_memory_by_batch": peaks,
    }


def placement() -> Any:
    """Where all sides run, and in what precision: what `model.device: auto` and `model.dtype: auto` give."""
    from pipeline.model.device import place

    return place("auto", "auto")


def device_name() -> str:
    """The device and the precision, for a person."""
    import platform

    import torch

    at = placement()
    name = torch.cuda.get_device_name(at.device) if at.device.type == "cuda" else platform.machine()
    return f"{at.device.type} ({name}), {str(at.dtype).removeprefix('torch.')}"


def matmul_peak() -> float:
    """Operations a second of a product of two square matrices in the sides' precision, the best of many."""
    import torch

    at = placement()
    size = 1536 if at.device.type == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=at.device).to(at.dtype)
    best, end = float("inf"), time.perf_counter() + 2
    while time.perf_counter() < end:
        began = time.perf_counter()
        product = torch.mm(left, right)
        product[0, 0].item()  # a GPU answers when it is done
        best = min(best, time.perf_counter() - began)
    return float(2 * size**3 / best)


def compare(work: Work, sides: dict[str, dict[str, Any]], peak: float) -> dict[str, Any]:
    """The figures of one call; ratios above 1 are in this project's favour."""
    totals = {name: sum(side["seconds"].values()) for name, side in sides.items()}
    ours = totals["ours"]
    baselines = [side["steps"] for name, side in sides.items() if name != "ours"]

    def largest(metric: str) -> float | None:
        if metric not in sides["ours"]["steps"][0]:
            return None
        apart = [
            abs(mine[metric] - theirs[metric])
            for steps in baselines
            for mine, theirs in zip(sides["ours"]["steps"], steps, strict=True)
        ]
        return float(max(apart))

    return {
        "ratio_default": totals["trl"] / ours,
        "ratio_tuned": totals["trl-tuned"] / ours,
        "max_loss_difference": largest("loss"),
        "max_margin_difference": largest("margin"),
        "roofline_fraction": work.flops / ours / peak,
        "peak_memory_ratio": sides["ours"]["peak_memory"]
        / min(side["peak_memory"] for name, side in sides.items() if name != "ours"),
        "matmul_peak": peak,
        "flops": work.flops,
        "rows": work.rows,
        "tokens": work.tokens,
        "sides": {
            name: {**side, "total_seconds": totals[name], "tokens_per_second": work.tokens / totals[name]}
            for name, side in sides.items()
        },
    }


def describe(work: Work, figures: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [work.says, ""]
    phases = list(figures["sides"]["ours"]["seconds"])
    heads = [*(f"{phase}, s" for phase in phases), "total, s", "tokens/s", "peak MiB"]
    lines.append(f"{'':<50}" + "".join(f"{head:>15}" for head in heads))
    for name, side in figures["sides"].items():
        seconds = [f"{side['seconds'].get(phase, 0):.1f}" for phase in phases]
        cells = [*seconds, f"{side['total_seconds']:.1f}", f"{side['tokens_per_second']:,.0f}"]
        cells.append(f"{side['peak_memory'] / 2**20:,.0f}")
        lines.append(f"{SIDES[name]:<50}" + "".join(f"{cell:>15}" for cell in cells))
    shown = [metric for metric in METRICS if metric in figures["sides"]["ours"]["steps"][0]]
    lines += ["", f"{'step':<6}" + "".join(f"{f'{metric}, {name}':>20}" for metric in shown for name in SIDES)]
    for at in range(len(figures["sides"]["ours"]["steps"])):
        values = [figures["sides"][name]["steps"][at][metric] for metric in shown for name in SIDES]
        lines.append(f"{at + 1:<6}" + "".join(f"{value:>20.6f}" for value in values))
    lines.append("")
    for key in ("ratio_default", "ratio_tuned", "max_loss_difference", "max_margin_difference", "roofline_fraction"):
        if figures[key] is not None:
            lines.append(f"{key:<24}{figures[key]:.6g}")
    lines.append(f"{'peak_memory_ratio':<24}{figures['peak_memory_ratio']:.4g}")
    if "batch_of_trl" in figures:
        tried = ", ".join(f"{size}: {peak / 2**20:,.0f}" for size, peak in figures["peak_memory_by_batch"].items())
        lines.append(f"{'batch_in_same_memory':<24}{figures['batch_in_same_memory']}, TRL's {figures['batch_of_trl']}")
        lines.append(f"{'batch_in_default_memory':<24}{figures['batch_in_default_memory']}")
        lines.append(f"(peak MiB by batch: {tried}; {work.rows} rows)")
    lines.append(f"(matrix product: {figures['matmul_peak'] / 1e9:.0f} GFLOP/s on {figures['device']})")
    return "\n".join(lines)
