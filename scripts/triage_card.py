"""The data card of datasets/triage; every figure in it is computed from the rows that it describes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from statistics import mean
from string import Template
from typing import Any

from triage_answers import PROMISE, promises
from triage_grammar import EXTENTS, SEVERITIES, SEVERITY, load_faults
from triage_voices import VOICES

Row = dict[str, Any]
NEAR = 0.8
"""Jaccard similarity of word 3-grams from which two reports count as near-duplicates."""

_PAGE = Template("""\
---
license: apache-2.0
language: en
pretty_name: Incident triage
size_categories: [1K<n<10K]
task_categories: [text-generation]
tags: [synthetic, preference, dpo, sft, json, triage]
configs:
  - config_name: demonstrations
    data_files:
      - {split: train, path: demonstrations.train.jsonl}
      - {split: validation, path: demonstrations.eval.jsonl}
  - config_name: preferences
    data_files:
      - {split: train, path: preferences.train.jsonl}
      - {split: validation, path: preferences.eval.jsonl}
  - config_name: held-out
    data_files:
      - {split: test, path: held-out.jsonl}
---
<!-- Written by scripts/make_triage.py, figures included: change the script, not this file. -->

# Incident triage

An incident report goes in; one JSON object comes out, as a support team's tool would want it: `severity`,
`component`, `summary`, `action`. The reports are invented, about an invented web shop.

The set tells the story that preference tuning is for. The demonstrations are right in form and in content,
but most of them carry a habit that the team wants stopped: they promise a repair time ("We expect a fix within
2 hours."). A model tuned on them learns the task and the habit. The preferences teach the same answers
without it.

## Files

| file | rows | words of a report (min, mean, max) | words of the answer (min, mean, max) |
| --- | ---: | --- | --- |
$files

For preferences the answer is the chosen one. A row has the roles system, user and assistant; the system turn is
the same everywhere. Preference rows carry, beside `prompt`, `chosen` and `rejected`, the key `flaw`.
`output.schema.json` is the JSON Schema (draft 2020-12) of an answer.

```text
SHA-256
$hashes
```

## How it was made

By `scripts/make_triage.py`, from one seeded generator and without a model: running it again writes the same
bytes, and `--check` says whether the files are what it writes. There are $components components
with $per_component faults each.

A report is drawn from a **combination key: component, fault, extent, voice**. The extent is how far the fault
reaches ($extents), the voice is who writes
($voices).
Each of the $combinations combinations is used at most once over *all* files, so no report of `held-out.jsonl` or
of an eval file shares its combination with a trained one, and no text of a report occurs twice anywhere. Each
fault by itself does occur in training: what is held out is how things combine, not the vocabulary.

Whatever the voice, a report states the fault, its extent and its effect. Times, versions, names, small talk and
other components that are fine are there to be read past; some reports have a typing slip.

### The rule for severity

| effect, as the report says it | severity |
| --- | --- |
$rule

How many people are affected is said as well, and does not count.

The summary restates the fault and its effect, from which the severity follows; the action depends on both.

### The habit

A promise of a repair time is recognised by one regular expression, searched in the answer alone (a report may
mention times):

```text
$promise
```

It matches $habit_train of the answers in `demonstrations.train.jsonl`, $habit_eval of those in
`demonstrations.eval.jsonl`, and $habit_clean of the chosen and held-out answers. Which demonstrations carry it is
drawn by lot, independently of the report; by severity of the training rows the shares are
$habit_by_severity.
About seven promises in eight stand at the end of the action, the others after the summary.

### What is wrong with rejected answers

| flaw | train | eval | |
| --- | ---: | ---: | --- |
$flaws

## Distributions

| severity | $heads |
| --- | $rules |
$severities

| component | $heads |
| --- | $rules |
$components_table

## Duplicates

Share of reports with a near-duplicate, that is another report with a Jaccard similarity of word 3-grams of at
least $near:

| reports of | against | share |
| --- | --- | ---: |
$duplicates

Answers repeat more than reports, since the same fault and extent have few right wordings: $recur of the answers
in `held-out.jsonl` also occur, word for word, as the answer to another report in a train file. Held-out figures
therefore say how well a model reads reports, not how well it writes.

## What it must not be used for

- Judging models in general, or triaging real incidents: severity follows the small rule above, the language is
  a grammar's, and a model that does well here has shown that it learnt this grammar, no more.
- Learning what a good action is: the actions are plausible, not expert advice.
- Comparing preference methods at large: most pairs differ by one sentence, and the rejected answer is mostly
  the longer one, so a method that merely favours short answers does well on them.

The people's names are common first names drawn at random. License: Apache-2.0, as the repository.
""")
_FLAWS = {
    "promise": "right, but promises a repair time",
    "wrong-severity": "the next severity up or down, and the action that goes with it",
    "invented-fact": "the summary adds a cause or a figure that the report does not have",
    "prose-around-json": "a right answer with words or a code fence around it",
    "broken-schema": "a key missing or too many, a value outside its list, or no valid JSON",
    "needless-length": "summary and action padded",
}
_EFFECTS = {
    "looks": "cosmetic, nothing is hindered",
    "detour": "something fails, there is a workaround",
    "blocked": "something fails, and work is blocked",
    "loss": "money or data is lost, or private data leaks",
}


def report(row: Row) -> str:
    """What the user says."""
    turns = row.get("messages") or row["prompt"]
    return next(str(turn["content"]) for turn in turns if turn["role"] == "user")


def answer(row: Row) -> str:
    """The demonstrated, or chosen, answer."""
    return str((row.get("messages") or row["chosen"])[-1]["content"])


def _spread(texts: Iterable[str]) -> str:
    counts = [len(text.split()) for text in texts]
    return f"{min(counts)}, {mean(counts):.1f}, {max(counts)}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def _habit(texts: list[str]) -> str:
    return _percent(sum(map(promises, texts)), len(texts))


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def near_duplicates(texts: list[str], others: list[str] | None = None) -> int:
    """How many of the texts are near to one of the others; without others, to another of themselves."""
    mine = [_trigrams(text) for text in texts]
    theirs = mine if others is None else [_trigrams(text) for text in others]
    count = 0
    for one in mine:
        for other in theirs:
            shared = len(one & other)
            if other is not one and shared >= NEAR * (len(one) + len(other) - shared):
                count += 1
                break
    return count


def _table(rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _by_value(key: str, values: Iterable[str], rows: dict[str, list[Row]]) -> str:
    counts = {name: Counter(json.loads(answer(row))[key] for row in file) for name, file in rows.items()}
    return _table([value, *(counts[name][value] for name in rows)] for value in values)


def card(rows: dict[str, list[Row]], texts: dict[str, str]) -> str:
    """The page for these rows by file name; `texts` are the files as written, for their hashes."""
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    reports = {name: [report(row) for row in file] for name, file in rows.items()}
    answers = {name: [answer(row) for row in file] for name, file in rows.items()}
    faults = load_faults()
    components = list(dict.fromkeys(fault.component.name for fault in faults))
    trained = [name for name in rows if ".train." in name]
    trained_reports = [text for name in trained for text in reports[name]]
    trained_answers = {text for name in trained for text in answers[name]}
    held = answers["held-out.jsonl"]
    flaws = {name: Counter(row["flaw"] for row in file) for name, file in rows.items() if "flaw" in file[0]}
    duplicates = [(name, "the same file", near_duplicates(reports[name]), len(reports[name])) for name in rows]
    near_train = near_duplicates(reports["held-out.jsonl"], trained_reports)
    duplicates.append(("held-out.jsonl", "both train files", near_train, len(held)))

    demonstrated = answers["demonstrations.train.jsonl"]
    clean = [text for name in rows if not name.startswith("demonstrations") for text in answers[name]]
    by_severity = {
        severity: [text for text in demonstrated if json.loads(text)["severity"] == severity] for severity in SEVERITIES
    }

    return _PAGE.substitute(
        files=_table([f"`{name}`", len(rows[name]), _spread(reports[name]), _spread(answers[name])] for name in rows),
        hashes="\n".join(f"{digest}  {name}" for name, digest in hashes.items()),
        components=len(components),
        per_component=len(faults) // len(components),
        extents=", ".join(EXTENTS),
        voices=", ".join(VOICES),
        combinations=len(faults) * len(EXTENTS) * len(VOICES),
        rule=_table([_EFFECTS[kind], severity] for kind, severity in SEVERITY.items()),
        promise=PROMISE,
        habit_train=_habit(demonstrated),
        habit_eval=_habit(answers["demonstrations.eval.jsonl"]),
        habit_clean=_habit(clean),
        habit_by_severity=", ".join(f"{_habit(texts)} ({severity})" for severity, texts in by_severity.items()),
        flaws=_table([flaw, *(counts[flaw] for counts in flaws.values()), meaning] for flaw, meaning in _FLAWS.items()),
        heads=" | ".join(name.removesuffix(".jsonl") for name in rows),
        rules=" | ".join("---:" for _ in rows),
        severities=_by_value("severity", SEVERITIES, rows),
        components_table=_by_value("component", components, rows),
        near=NEAR,
        duplicates=_table((f"`{name}`", against, _percent(near, count)) for name, against, near, count in duplicates),
        recur=_percent(sum(text in trained_answers for text in held), len(held)),
    )
