"""What is kept of every evaluation beside its means, and what is told when the run's health suffers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pipeline.runs.files import write_atomically
from pipeline.runs.run import Run
from pipeline.tracking import Mirrors
from pipeline.training.watch.health import Finding, examine
from pipeline.training.watch.history import History, Pairs, Sample, Setting

PAIRS = "pairs.jsonl"
"""One object an evaluation: every held-out pair's rewards and completion tokens, in the order of the file."""
GENERATIONS = "generations.jsonl"
"""One object a sampled answer."""
_COLUMNS = ("rewards/chosen", "rewards/rejected", "tokens/chosen", "tokens/rejected")
"""Of an evaluation's pairs, in the order of `Pairs`."""


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Writes pairs and sampled answers to the run folder, and findings to the manifest.

    Stands behind the recorder, which writes `metrics.jsonl`: a resumed run's earlier steps are read from there.

    Args:
        run: whose folder and manifest.
        mirrors: where histograms and samples go besides.
        setting: of the run; how many steps it has is known when training begins.
        take_pairs: the pairs of the evaluation that has just ended, by its step; None where the stage has none.
        ask: the answers to the sampled prompts; empty where there are none.
        tell: shows the user a finding.
        say: tells the user one line.
    """

    def __init__(
        self,
        run: Run,
        mirrors: Mirrors,
        setting: Setting,
        *,
        take_pairs: Callable[[int], Pairs | None] | None,
        ask: Callable[[], list[Sample]],
        tell: Callable[[Finding], None],
        say: Callable[[str], None],
    ) -> None:
        self._run = run
        self._mirrors = mirrors
        self._history = History(setting)
        self._take_pairs = take_pairs
        self._ask = ask
        self._tell = tell
        self._say = say
        self._health: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up a resumed run where it goes on; what came after that step is as if it had not been."""
        args.eval_on_start = args.eval_on_start and state.global_step == 0  # it was evaluated there before
        if not state.is_world_process_zero:
            return
        self._history = History(replace(self._history.setting, max_steps=state.max_steps))
        for record in _lines(self._run.metrics_file):
            self._history.add(record)
        # An evaluation that is not in metrics.jsonl, which was cut back to the checkpoint, is still to come.
        evaluated = {record["step"] for record in self._history.evaluations}
        for name, take_up in ((PAIRS, self._take_up_pairs), (GENERATIONS, self._take_up_samples)):
            file = self._run.path / name
            kept = [record for record in _lines(file) if record["step"] in evaluated]
            if file.exists():
                write_atomically(file, "".join(map(_line, kept)))
            take_up(kept)
        self._health = [
            finding for finding in self._run.manifest.get("health", []) if finding["step"] <= state.global_step
        ]
        self._run.update(health=self._health)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at a logged step."""
        if logs and state.is_world_process_zero:
            self._history.add({"step": state.global_step, **{name: _finite(value) for name, value in logs.items()}})
            self._examine()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the pairs and the sampled answers of an evaluation, and looks at them."""
        pairs = self._take_pairs(state.global_step) if self._take_pairs is not None else None
        if not state.is_world_process_zero:
            return
        if pairs is not None:
            self._keep_pairs(pairs)
        elif self._take_pairs is not None:
            self._say("single pairs are not recorded: this version of TRL gathers its rewards in another way")
            self._take_pairs = None
        if samples := self._ask():
            self._keep_samples(state.global_step, samples)
        self._examine()

    def _keep_pairs(self, pairs: Pairs) -> None:
        columns = (pairs.chosen_rewards, pairs.rejected_rewards, pairs.chosen_tokens, pairs.rejected_tokens)
        finite = {name: [_finite(value) for value in values] for name, values in zip(_COLUMNS, columns, strict=True)}
        _append(self._run.path / PAIRS, {"step": pairs.step, **finite})
        if all(map(math.isfinite, pairs.margins)):
            self._history.pairs = pairs
            self._mirrors.histogram(pairs.step, "eval_margins", pairs.margins)

    def _take_up_pairs(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The newest pairs that are finite, as `_keep_pairs` would have left them."""
        for record in records:
            columns = [record[name] for name in _COLUMNS]
            if not any(value is None for column in columns for value in column):
                self._history.pairs = Pairs(record["step"], *columns)

    def _take_up_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The answers of each evaluation so far: the rules look for what has become worse."""
        for step, rows in groupby(records, key=lambda record: record["step"]):
            samples = [Sample(row["prompt"], row["answer"], row["tokens"], row["ended"]) for row in rows]
            self._history.samples.append((step, samples))

    def _keep_samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [
            {"step": step, "prompt": one.prompt, "answer": one.answer, "tokens": one.tokens, "ended": one.ended}
            for one in samples
        ]
        for row in rows:
            _append(self._run.path / GENERATIONS, row)
        self._history.samples.append((step, samples))
        self._mirrors.table(step, "samples", list(rows[0]), [list(row.values()) for row in rows])

    def _examine(self) -> None:
        found = examine(self._history, {finding["code"] for finding in self._health})
        if found:
            self._health += [finding.as_dict() for finding in found]
            self._run.update(health=self._health)
        for finding in found:
            self._tell(finding)


def _finite(value: Any) -> Any:
    """None in the place of NaN and infinity, which JSON cannot say."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _append(file: Path, record: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_line(record))


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file, but for a last line that a killed process did not finish."""
    if not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
