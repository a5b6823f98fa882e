"""Trains the same rows on stock TRL and on this project, side by side: seconds, memory, every step's loss.

python scripts/benchmark.py dpo --rows 16
python scripts/benchmark.py partial --data preferences.jsonl --precision exact --format json

Same rows, seed, batch order and settings; the sides alternate, each in a process of its own. `ratio_default` is the
time of TRL as it comes over ours, `ratio_tuned` that of TRL tuned; `roofline_fraction` the operations that cannot be
left out over what the processor could have done in our time, by its measured float32 matrix product.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import tempfile
from pathlib import Path

from benchmark_cases import frame

_SHARED = {"__init__", "frame", "preferences"}
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
    parser.add_argument("--format", choices=("text", "json"), default="text")
    for name in ("side", "folder", "result"):  # how it calls itself
        parser.add_argument(f"--{name}", type=str if name == "side" else Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the sides of a case and prints what they did; or, called by itself, one side."""
    arguments = _arguments()
    case = importlib.import_module(f"benchmark_cases.{arguments.case}")
    if arguments.side:
        found = case.train(arguments.folder, arguments.side, arguments.precision)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["peak_memory"] = used if sys.platform == "darwin" else used * 1024  # Linux counts in KiB
        arguments.result.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = case.prepare(folder, arguments.data, arguments.rows)
        runs = [
            {side: frame.run_side(arguments.case, folder, side, arguments.precision) for side in frame.SIDES}
            for _ in range(arguments.repeats)
        ]
    sides = {side: frame.average([run[side] for run in runs]) for side in frame.SIDES}
    figures = {"case": arguments.case, "precision": arguments.precision}
    figures |= frame.compare(work, sides, frame.matmul_peak())
    print(json.dumps(figures) if arguments.format == "json" else frame.describe(work, figures))


if __name__ == "__main__":
    main()
