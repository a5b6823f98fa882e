"""Writes datasets/triage: demonstrations, preferences, held-out reports, output schema and data card.

    python scripts/make_triage.py            # write
    python scripts/make_triage.py --check    # exit 1 where a file differs from what would be written

Everything is drawn from one seeded generator, so the same script writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from triage_answers import FLAWS, output_schema, promise_key, render, right_answer, with_promise
from triage_card import card
from triage_grammar import EXTENTS, Combination, load_faults
from triage_voices import VOICES, write_report

FOLDER = Path(__file__).resolve().parent.parent / "datasets" / "triage"
SEED = 20
SYSTEM = "Triage the incident report as one JSON object: component, summary, severity, action."
ROWS = {
    "demonstrations.train.jsonl": 480,
    "demonstrations.eval.jsonl": 40,
    "preferences.train.jsonl": 320,
    "preferences.eval.jsonl": 40,
    "held-out.jsonl": 120,
}
HABIT_SHARE = 0.6
"""Share of demonstrations that promise a repair time: above a half, or greedy decoding would never show it."""
FLAW_SHARES = {
    "promise": 0.6,
    "wrong-severity": 0.1,
    "invented-fact": 0.08,
    "prose-around-json": 0.08,
    "broken-schema": 0.08,
    "needless-length": 0.06,
}
WORDS = (10, 60)
"""Fewest and most words of a report: what keeps a row cheap to train on."""

Row = dict[str, Any]


class Item(NamedTuple):
    """A row and the combination that its report was written from."""

    combination: Combination
    row: Row


def _combinations(rng: random.Random) -> list[Combination]:
    """All combinations, each once, so ordered that any stretch holds the faults about equally often."""
    decks = []
    for fault in load_faults():
        deck = [Combination(fault, extent, voice) for extent in EXTENTS for voice in VOICES]
        rng.shuffle(deck)
        decks.append(deck)
    ordered = []
    for turn in range(len(decks[0])):
        rng.shuffle(decks)
        ordered += [deck[turn] for deck in decks]
    return ordered


def _labels(rng: random.Random, shares: dict[str, float], count: int) -> list[str]:
    """`count` labels in these shares, in random order; the first label takes what rounding leaves."""
    first, *others = shares
    labels = [label for label in others for _ in range(round(shares[label] * count))]
    labels += [first] * (count - len(labels))
    rng.shuffle(labels)
    return labels


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


class Maker:
    """Makes rows, each from a combination and with a report that no other row has."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.combinations = iter(_combinations(self.rng))
        self.components = list(dict.fromkeys(fault.component for fault in load_faults()))
        self.seen: set[str] = set()

    def prompt(self) -> tuple[Combination, list[Row]]:
        combination = next(self.combinations)
        while True:
            report = write_report(self.rng, combination, self.components)
            if report not in self.seen and WORDS[0] <= len(report.split()) <= WORDS[1]:
                self.seen.add(report)
                return combination, [_turn("system", SYSTEM), _turn("user", report)]

    def demonstration(self, *, habit: bool) -> Item:
        combination, prompt = self.prompt()
        answer = right_answer(self.rng, combination)
        if habit:
            answer = with_promise(self.rng, answer, key=promise_key(self.rng))
        return Item(combination, {"messages": [*prompt, _turn("assistant", render(answer))]})

    def preference(self, flaw: str) -> Item:
        combination, prompt = self.prompt()
        answer = right_answer(self.rng, combination)
        row = {
            "prompt": prompt,
            "chosen": [_turn("assistant", render(answer))],
            "rejected": [_turn("assistant", FLAWS[flaw](self.rng, combination, answer))],
            "flaw": flaw,
        }
        return Item(combination, row)


def build() -> dict[str, list[Item]]:
    """The items of every file, by file name. Each combination is used at most once over all files."""
    maker = Maker()
    files: dict[str, list[Item]] = {}
    for name, count in ROWS.items():
        if name.startswith("preferences"):
            files[name] = [maker.preference(flaw) for flaw in _labels(maker.rng, FLAW_SHARES, count)]
        else:
            share = HABIT_SHARE if name.startswith("demonstrations") else 0.0
            habits = _labels(maker.rng, {"clean": 1 - share, "habit": share}, count)
            files[name] = [maker.demonstration(habit=habit == "habit") for habit in habits]
    return files


def contents() -> dict[str, str]:
    """The text of every file, by file name."""
    items = build()
    components = list(dict.fromkeys(fault.component.name for fault in load_faults()))
    texts = {
        name: "".join(json.dumps(item.row, ensure_ascii=False) + "\n" for item in file) for name, file in items.items()
    }
    texts["output.schema.json"] = json.dumps(output_schema(components), indent=2) + "\n"
    rows = {name: [item.row for item in file] for name, file in items.items()}
    texts["README.md"] = card(rows, texts)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files or checks them; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write datasets/triage.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    texts = contents()
    if not parser.parse_args(arguments).check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (FOLDER / name).write_bytes(text.encode())
        return 0
    different = [
        name
        for name, text in texts.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_bytes() != text.encode()
    ]
    for name in different:
        print(
            f"{FOLDER / name} is not what {Path(__file__).name} writes; run it without --check",
            file=sys.stderr,
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
