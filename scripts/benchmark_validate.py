"""Measures the check of preference rows: MB/s, rows/s, peak memory; near duplicates by themselves.

python scripts/benchmark_validate.py --size 1GB
python scripts/benchmark_validate.py --size 100MB --workers 1
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.data.check import check_file
from pipeline.data.parallel import check_large_file
from pipeline.data.result import Report

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def write_rows(path: Path, size: int, seed: int = 1) -> None:
    """Conversational preferences of about 2 kB, until the file has `size` bytes."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 9))) for _ in range(5000)]

    def turn(role: str, count: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=count))}

    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            row = {
                "prompt": [turn("system", 15), turn("user", draw.randint(60, 110))],
                "chosen": [turn("assistant", draw.randint(50, 140))],
                "rejected": [turn("assistant", draw.randint(50, 140))],
            }
            written += file.write(json.dumps(row) + "\n")


def measured(name: str, path: Path, check: Callable[[], Report]) -> None:
    """Runs and prints one measurement; the memory is the peak of this process and of the largest worker so far."""
    before, started = _seconds(), time.perf_counter()
    report = check()
    wall, busy = time.perf_counter() - started, _seconds() - before
    megabytes = path.stat().st_size / 1e6
    own, worker = (resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        f"{name:<24} {megabytes:,.0f} MB  {report.rows:,} rows  wall {wall:.1f} s  processor {busy:.1f} s  "
        f"{megabytes / wall:,.0f} MB/s  {report.rows / wall:,.0f} rows/s  "
        f"{megabytes / busy:,.0f} MB/s a core  peak {own:,.0f} MB + {worker:,.0f} MB a worker"
    )
    assert report.ok, report.errors[:3]


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="100MB", help="of the file, with KB, MB or GB")
    parser.add_argument("--near-size", default="10MB", help="of the file for near duplicates; 0MB: leave it out")
    parser.add_argument("--workers", type=int, help="processes; as many as there are cores")
    arguments = parser.parse_args()
    size, near = (int(float(text[:-2]) * UNITS[text[-2:].upper()]) for text in (arguments.size, arguments.near_size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, size)
        check = "schema, rules, copies"
        measured(check, path, lambda: check_large_file(path, near=False, workers=arguments.workers))
        if near:
            write_rows(path, near)
            measured("the same, one process", path, lambda: check_file(path))
            measured("with near duplicates", path, lambda: check_file(path, near=True))


if __name__ == "__main__":
    main()
