"""Measures what saving costs on the quickstart: seconds of a checkpoint against those of the steps between two of them.

python scripts/benchmark_saving.py
python scripts/benchmark_saving.py --steps 8 --format json

Trains a few steps of both stages of `recipes/triage.yaml` on its first rows, with a checkpoint behind each step. The
recipe saves at the end of an epoch or of the run, whichever comes first; `share` is what that is of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

RECIPE = Path(__file__).parents[1] / "recipes/triage.yaml"


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Keeps how long each call of a method takes."""
    stock: Callable[..., Any] = getattr(owner, name)

    def call(*given: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return stock(*given, **more)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, call)


def main() -> None:
    """Trains, and prints a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of each stage (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args()

    from pipeline.experiment_file import load_experiment
    from pipeline.training.dpo import run_dpo
    from pipeline.training.keeper import Keeper, Resumable
    from pipeline.training.sft import run_sft

    recipe = load_experiment(RECIPE).experiment
    console = Console(file=sys.stderr)
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = ["tracking.wandb.mode=disabled", "tracking.samples=0"]
        for kind, rows in (("demonstrations", recipe.sft), ("preferences", recipe.dpo)):
            split = getattr(recipe.data, kind)
            count = rows.per_device_train_batch_size * arguments.steps
            lines = Path(split.train).read_text(encoding="utf-8").splitlines()[:count]
            (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            settings += [f"data.{kind}.train={folder / f'{kind}.jsonl'}", f"data.{kind}.eval=null"]
        for stage in ("sft", "dpo"):
            settings += [f"{stage}.{key}" for key in ("save_strategy=steps", "save_steps=1", "eval_strategy=no")]
            settings += [f"{stage}.max_steps={arguments.steps}"]
        experiment = load_experiment(RECIPE, settings).experiment
        saves: list[float] = []
        steps: list[float] = []
        timed(Keeper, "save", saves)
        timed(Resumable, "training_step", steps)
        for stage, run, section in (("sft", run_sft, recipe.sft), ("dpo", run_dpo, recipe.dpo)):
            saves.clear()
            steps.clear()
            run(experiment, folder / "runs", console)
            # The optimizer's part of a step is left out, which makes the share too large, if anything.
            saving, step = statistics.median(saves[: arguments.steps]), statistics.median(steps)
            interval = section.max_steps
            figures[stage] = {
                "checkpoint_seconds": saving,
                "step_seconds": step,
                "interval": interval,
                "share": saving / (saving + interval * step),
            }
            if arguments.format == "text":
                print(
                    f"{stage}: a checkpoint {saving:.2f} s, a step {step:.2f} s, one checkpoint in {interval} steps: "
                    f"{figures[stage]['share']:.2%} of the time",
                    flush=True,
                )
    if arguments.format == "json":
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
