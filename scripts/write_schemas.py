"""Writes the schemas that are generated from the typed definitions.

python scripts/write_schemas.py            # write
python scripts/write_schemas.py --check    # exit with 1 where the committed file differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pipeline.experiment_schema import experiment_schema

FILE = Path(__file__).resolve().parent.parent / "schemas" / "experiment.schema.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    text = json.dumps(experiment_schema(), indent=2, ensure_ascii=False) + "\n"
    if not arguments.check:
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
        print(f"{FILE} is not what the definition gives: run scripts/write_schemas.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
