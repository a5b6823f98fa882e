"""`pipeline chat RUN`: the base and the tuned model answer side by side, each in a conversation of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.data.place import printable
from pipeline.data.rows import Message
from pipeline.evaluation.generation import generate
from pipeline.evaluation.runs import experiment_of
from pipeline.experiment import Experiment
from pipeline.model.adapter import attached
from pipeline.model.base import load_base
from pipeline.model.ground import prepare_ground, quiet_libraries
from pipeline.runs.run import Run
from pipeline.training.engine.linear import added_up

Reply = Callable[[str], dict[str, str]]
"""A user's turn to the answers, by the model's name."""


@contextmanager
def conversation(
    run: Run | Path, experiment: Experiment, console: Console, *, system: str | None = None
) -> Iterator[Reply]:
    """Base and adapter in memory, and a function that takes a user's turn.

    Each model sees its own earlier answers, not the other's. Answers are greedy, so a conversation can be repeated.

    Args:
        run: a run of ours, or an adapter's folder.
        experiment: whose base, tokenizer and answer length are used.
        console: where it is said what is loaded.
        system: a system turn to begin with.

    Raises:
        PipelineError: base or adapter are not to be had, or a conversation grew too long.
    """
    quiet_libraries()
    ground = prepare_ground(experiment, console.print)
    base = load_base(ground.files, experiment.model, ground.placement)
    folder = run.adapter if isinstance(run, Run) else run
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    tuned = run.stage if isinstance(run, Run) else run.name
    said = {"base": list(start), tuned: list(start)}

    with attached(base, folder) as model, added_up(model):

        def answer(name: str) -> str:
            (given,) = generate(
                model, ground.tokenizer, [said[name]], max_new_tokens=experiment.evaluation.max_new_tokens, batch_size=1
            )
            return given.text

        def reply(text: str) -> dict[str, str]:
            for turns in said.values():
                turns.append({"role": "user", "content": text})
            with model.disable_adapter():
                answers = {"base": answer("base")}
            answers[tuned] = answer(tuned)
            for name, given in answers.items():
                said[name].append({"role": "assistant", "content": given})
            return answers

        yield reply


def chat(run: Run | Path, console: Console, *, system: str | None = None) -> list[dict[str, Any]]:
    """Reads turns from standard input, one a line, until it ends; prints what both answer.

    Returns:
        Every turn: `{"user": …, "base": …, "dpo": …}`.

    Raises:
        PipelineError: as `conversation` does; an adapter's folder names no base to chat with.
    """
    turns: list[dict[str, Any]] = []
    with conversation(run, experiment_of(run), console, system=system) as reply:
        asking = sys.stdin.isatty()
        if asking:
            console.print("Ctrl-D ends.", style="dim")
        while True:
            if asking:
                console.print(Text("you> ", style="bold"), end="")
            line = sys.stdin.readline()
            if not line:
                break
            text = line.strip()
            if not text:
                continue
            answers = reply(text)
            for name, given in answers.items():
                console.print(Text(f"{name}> ", style="bold").append(_shown(given), style="not bold"))
            turns.append({"user": text, **answers})
    return turns


def _shown(text: str) -> str:
    """Line by line, with nothing in it that a terminal would act on."""
    return "\n".join(map(printable, text.split("\n")))
