"""Alpaca's shape, and the columns of data sets that name a question and two answers.

The instruction and the input become one user turn, with a line feed between them. That is how LLaMA-Factory reads
Alpaca files (its `data/README.md`), which is also where the preference forms, `system` and `history` come from.
"""

from __future__ import annotations

from typing import Any

from pipeline.data.convert.base import Converted, turn
from pipeline.data.place import Keys
from pipeline.data.rows import Demonstration, Message, Preference


def demonstration(value: dict[str, Any], line: int) -> Converted:
    """`instruction`, `input`, `output`; the answers in `history` are trained on as well."""
    prompt, places = _prompt(value, "instruction")
    row = Demonstration(messages=[*prompt, turn("assistant", value["output"])], line=line)
    return Converted(row, {"messages": [*places, ("output",)]})


def preference(value: dict[str, Any], line: int) -> Converted:
    """`chosen` and `rejected` in place of `output`."""
    return _pair(value, line, "instruction", ("chosen",), ("rejected",))


def ranked(value: dict[str, Any], line: int) -> Converted:
    """`output` with two answers, the better one first."""
    return _pair(value, line, "instruction", ("output", 0), ("output", 1))


def question(value: dict[str, Any], line: int) -> Converted:
    """Intel's orca_dpo_pairs: `system`, `question`, `chosen`, `rejected`."""
    return _pair(value, line, "question", ("chosen",), ("rejected",))


def input_preference(value: dict[str, Any], line: int) -> Converted:
    """Argilla's distilabel-intel-orca-dpo-pairs: `system`, `input`, `chosen`, `rejected`."""
    return _pair(value, line, "input", ("chosen",), ("rejected",))


def responses(value: dict[str, Any], line: int) -> Converted:
    """Argilla's ultrafeedback-binarized-preferences: `instruction`, `chosen_response`, `rejected_response`."""
    return _pair(value, line, "instruction", ("chosen_response",), ("rejected_response",))


def _pair(value: dict[str, Any], line: int, question: str, chosen: Keys, rejected: Keys) -> Converted:
    prompt, places = _prompt(value, question)
    answers = [[turn("assistant", _at(value, keys))] for keys in (chosen, rejected)]
    row = Preference(prompt, answers[0], answers[1], line=line)
    return Converted(row, {"prompt": places, "chosen": [chosen], "rejected": [rejected]})


def _prompt(value: dict[str, Any], question: str) -> tuple[list[Message], list[Keys]]:
    """The turns before the answer, and where they stand."""
    turns: list[Message] = []
    places: list[Keys] = []
    if (system := value.get("system")) and system.strip():
        turns.append(turn("system", system))
        places.append(("system",))
    for index, exchange in enumerate(value.get("history") or ()):
        turns += [turn("user", exchange[0]), turn("assistant", exchange[1])]
        places += [("history", index, 0), ("history", index, 1)]
    text = value[question]
    if question == "instruction" and (more := value.get("input")):
        text = f"{text}\n{more}"
    return [*turns, turn("user", text)], [*places, (question,)]


def _at(value: Any, keys: Keys) -> str:
    for key in keys:
        value = value[key]
    return str(value)
