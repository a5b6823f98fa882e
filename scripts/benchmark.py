"""Trains the same rows on stock TRL and on this project, side by side: seconds, memory, every step's loss.

python scripts/benchmark.py dpo --rows 16
python scripts/benchmark.py partial --data preferences.jsonl --precision exact --format json

Same rows, seed, batch order and settings; the sides alternate, each in a process of its own, on the best device there
is and in the precision that the commands would take there. `ratio_default` is the time of TRL as it comes over ours,
`ratio_tuned` that of TRL tuned; `roofline_fraction` the operations that cannot be left out over what the device could
have done in our time, by its measured matrix product. With `--same-memory`, `batch_in_same_memory` is the largest batch
of ours that takes no more memory than TRL tuned. With `--shape`, a model of that shape with random weights, for a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmark_cases import frame
from benchmark_cases.shapes import SHAPES, write_random

_SHARED = {"__init__", "frame", "preferences", "shapes"}
CASES = sorted({path.stem for path in (Path(__file__).parent / "benchmark_cases").glob("*.py")} - _SHARED)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", type=Path, help="rows in any format that the commands read; else shipped ones")
    parser.add_argument("--rows", type=int, default=32, help="how many of them (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, alternating (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("auto", "exact", "fast"), default="auto", help="ours (default: %(default)s)"
    )
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", default="builtin:smollm2-135m", help="a folder, or (default) %(default)s")
    models.add_argument("--shape", choices=SHAPES, help="random weights in the shape of this model")
    parser.add_argument(
        "--same-memory", action="store_true", help="also ours in batches twice as large, and so on, up to TRL's memory"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    own: dict[str, Any] = {"side": str, "folder": Path, "result": Path, "batch": int}
    for name, kind in own.items():  # how it calls itself
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def _model(name: str) -> Path:
    from pipeline.model.builtin import builtin_model

    return builtin_model(name) if name.startswith("builtin:") else Path(name).resolve(strict=True)


def main() -> None:
    """Runs the sides of a case and prints what they did; or, called by itself, one side."""
    arguments = _arguments()
    case = importlib.import_module(f"benchmark_cases.{arguments.case}")
    if arguments.side:
        from pipeline.model.device import peak_memory

        found = case.train(arguments.folder, arguments.side, arguments.precision, arguments.batch)
        found["peak_memory"] = peak_memory(frame.placement())
        arguments.result.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.shape:
            write_random(folder / frame.BASE, SHAPES[arguments.shape], frame.placement())
        else:
            (folder / frame.BASE).symlink_to(_model(arguments.model), target_is_directory=True)
        work = case.prepare(folder, arguments.data, arguments.rows)
        how = arguments.case, folder
        runs = [
            {side: frame.run_side(*how, side, arguments.precision, case.BATCH) for side in frame.SIDES}
            for _ in range(arguments.repeats)
        ]
        sides = {side: frame.average([run[side] for run in runs]) for side in frame.SIDES}
        figures = {"case": arguments.case, "precision": arguments.precision, "device": frame.device_name()}
        figures |= frame.compare(work, sides, frame.matmul_peak())
        if arguments.same_memory:
            figures |= frame.grow(*how, arguments.precision, work, case.BATCH, sides)
    print(json.dumps(figures) if arguments.format == "json" else frame.describe(work, figures))


if __name__ == "__main__":
    main()
