"""`pipeline inspect`: a row as the model will see it, token by token, without loading a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from pipeline.data.check import CheckedRows, load_rows
from pipeline.data.masks import IGNORED, label_demonstration, tokens_of
from pipeline.data.place import printable
from pipeline.data.rows import Demonstration, Message, Preference
from pipeline.data.shards import expand
from pipeline.data.tokenised import Counted, label_demonstrations, tokenize_preferences
from pipeline.data.tokens import render, tokenize_sequences
from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Experiment

Stage = Literal["sft", "dpo"]
_LOST_SHOWN = 200
"""Tokens behind the cut that are shown to a person."""


@dataclass(frozen=True)
class Example:
    """One sequence that is trained on: a demonstration, or one side of a preference."""

    stage: Stage
    file: str
    row: int
    """Its number as `--row` takes it (`number_of`)."""
    line: int
    side: str | None
    """`chosen` or `rejected`; None for a demonstration."""
    ids: list[int]
    """`[T]`, as trained on: after the cut."""
    tokens: list[str]
    """`[T]`, each decoded on its own; a character of several tokens shows as `�` in each."""
    mask: list[int]
    """`[T]`, 1 in the loss, 0 outside."""
    origin: list[str | None]
    """`[T]`, `content` (what the row's author wrote) or `template`; None where that cannot be told."""
    cut_ids: list[int]
    """What lies behind `max_length`, and is not trained on."""
    cut_tokens: list[str]
    max_length: int
    findings: list[dict[str, Any]]
    """What `pipeline validate` says of the row as tokens."""

    def as_dict(self) -> dict[str, Any]:
        """The example as `--format json` prints it."""
        return {
            "stage": self.stage,
            "file": self.file,
            "row": self.row,
            "line": self.line,
            "side": self.side,
            "tokens": self.tokens,
            "ids": self.ids,
            "mask": self.mask,
            "origin": self.origin,
            "length": len(self.ids) + len(self.cut_ids),
            "max_length": self.max_length,
            "truncated": bool(self.cut_ids),
            "cut": {"tokens": self.cut_tokens, "ids": self.cut_ids},
            "findings": self.findings,
        }


def inspect(
    experiment: Experiment, tokenizer: Any, stage: Stage | None = None, row: int | None = None
) -> list[Example]:
    """A row of the training file of a stage, as its trainer gets it.

    Args:
        experiment: with absolute paths.
        tokenizer: the model's.
        stage: None: each stage that has data.
        row: as `number_of` counts, in the first of several shards; None: the first row that is right.

    Raises:
        PipelineError: no such data, file or row, the row is wrong, or the chat template refuses it.
    """
    splits = {"sft": experiment.data.demonstrations, "dpo": experiment.data.preferences}
    stages = [one for one in ("sft", "dpo") if splits[one] is not None and stage in (None, one)]
    if not stages:
        kind = {"sft": "demonstrations", "dpo": "preferences", None: "demonstrations"}[stage]
        raise PipelineError(
            f"the experiment names no {kind}",
            code="missing-key",
            pointer=f"/data/{kind}",
            mend=f"add `data: {{{kind}: {{train: FILE}}}}`",
        )
    examples: list[Example] = []
    for one in stages:
        split = splits[one]
        assert split is not None
        file = expand(Path(split.train))[0]
        if one == "sft":
            rows = _only(load_rows(file, "demonstration", set_aside=True, columns=split.map), row)
            examples.append(_demonstration(tokenizer, rows, experiment.sft.max_length))
        else:
            pairs = _only(load_rows(file, "preference", set_aside=True, columns=split.map), row)
            examples += _preference(tokenizer, pairs, experiment.dpo.max_length)
    return examples


def number_of(line: int | None, pointer: str) -> int:
    """The number of a row, from 1, as it is found in the file: its line in JSONL and CSV, else which row it is.

    Args:
        line: where it begins.
        pointer: of the row: `/0` for the first of a JSON array or of a table, empty in JSONL and CSV.
    """
    return int(pointer[1:]) + 1 if pointer else line or 0


def _only(rows: CheckedRows[Any], row: int | None) -> CheckedRows[Any]:
    """The rows without all but the one that is asked for."""
    numbers = [number_of(one.line, pointer) for one, pointer in zip(rows.rows, rows.pointers, strict=True)]
    wrong = {number_of(one.line, one.pointer): one for one in rows.set_aside}
    if row in wrong:
        code, message = wrong[row].reasons[0]
        raise PipelineError(
            message,
            code=code,
            file=rows.report.file,
            line=wrong[row].line,
            pointer=wrong[row].pointer or None,
            mend=f"the row is wrong and would not be trained on: see `pipeline validate {rows.report.file}`",
            exit_code=ExitCode.WRONG,
        )
    at = numbers.index(row) if row in numbers else 0
    if not numbers or (row is not None and row not in numbers):
        what = "there is no right row" if row is None else f"no row has the number {row}"
        known = sorted([*numbers, *wrong])
        raise PipelineError(
            what,
            code="no-such-row",
            file=rows.report.file,
            mend=f"give a row's number as `pipeline validate` names it, from {known[0]:,} to {known[-1]:,}; of several "
            "shards this is the first, name another with --set",
            exit_code=ExitCode.USAGE,
        )
    return CheckedRows([rows.rows[at]], rows.report, [], [rows.pointers[at]])


def _demonstration(tokenizer: Any, rows: CheckedRows[Demonstration], max_length: int) -> Example:
    one = rows.rows[0]
    whole = label_demonstration(tokenizer, one)
    counted = label_demonstrations(tokenizer, rows, max_length)[1]
    mask = [int(label != IGNORED) for label in whole.labels]
    if one.messages is not None:
        origin = _origin(tokenizer, one.messages, one.tools, whole.input_ids)
    else:
        origin = _plain_origin(tokenizer, f"{one.prompt}{one.completion}", whole.input_ids)
    return _example("sft", rows, None, whole.input_ids, mask, origin, tokenizer, counted, max_length)


def _preference(tokenizer: Any, rows: CheckedRows[Preference], max_length: int) -> Iterator[Example]:
    one = rows.rows[0]
    whole = tokenize_sequences(tokenizer, one)
    counted = tokenize_preferences(tokenizer, rows, max_length)[1]
    for side, ids in (("chosen", whole.chosen), ("rejected", whole.rejected)):
        answer = getattr(one, side)
        if isinstance(one.prompt, str):
            origin = _plain_origin(tokenizer, f"{one.prompt}{answer}", ids)
        else:
            origin = _origin(tokenizer, [*one.prompt, *answer], one.tools, ids)
        mask = [int(at >= whole.start) for at in range(len(ids))]
        yield _example("dpo", rows, side, ids, mask, origin, tokenizer, counted, max_length)


def _example(
    stage: Stage,
    rows: CheckedRows[Any],
    side: str | None,
    ids: list[int],
    mask: list[int],
    origin: list[str | None],
    tokenizer: Any,
    counted: Counted,
    max_length: int,
) -> Example:
    tokens = [tokenizer.decode([token]) for token in ids]
    return Example(
        stage=stage,
        file=rows.report.file,
        row=number_of(rows.rows[0].line, rows.pointers[0]),
        line=rows.rows[0].line,
        side=side,
        ids=ids[:max_length],
        tokens=tokens[:max_length],
        mask=mask[:max_length],
        origin=origin[:max_length],
        cut_ids=ids[max_length:],
        cut_tokens=tokens[max_length:],
        max_length=max_length,
        findings=[violation.as_dict() for violation in counted.errors + counted.warnings],
    )


def _origin(tokenizer: Any, messages: Sequence[Message], tools: Any, ids: list[int]) -> list[str | None]:
    """Which tokens hold what the messages say, found turn by turn in the rendered text."""
    text = render(tokenizer, messages, tools)
    known, starts = tokens_of(tokenizer, text)
    if known != ids[: len(known)]:
        return [None] * len(ids)
    inside, reached = [False] * len(text), 0
    for message in messages:
        content = str(message["content"]).strip()
        at = text.find(content, reached) if content else -1
        if at >= 0:
            reached = at + len(content)
            inside[at:reached] = [True] * len(content)
    ends = [*starts[1:], len(text)]
    origin: list[str | None] = [
        "content" if any(inside[start : max(end, start + 1)]) else "template"
        for start, end in zip(starts, ends, strict=True)
    ]
    return origin + ["template"] * (len(ids) - len(origin))


def _plain_origin(tokenizer: Any, text: str, ids: list[int]) -> list[str | None]:
    """Plain text is all its author's, but for the eos token that is set behind it."""
    added = int(not text.endswith(tokenizer.eos_token))
    return [*["content"] * (len(ids) - added), *["template"] * added]


def print_examples(examples: Sequence[Example], console: Console, tokenizer: Any, *, with_ids: bool = False) -> None:
    """Shows examples to a person: what is in the loss green, what the template wrote dim.

    Where there are no colours, what is in the loss stands between `⟦` and `⟧`.
    """
    unicode = console.encoding.startswith("utf")
    coloured = console.is_terminal and not console.no_color
    marks = ("", "") if coloured else ("⟦", "⟧") if unicode else ("[[", "]]")

    def say(line: Text | str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    for example in examples:
        side = f", {example.side}" if example.side else ""
        in_loss, length = sum(example.mask), len(example.ids)
        say(Text(f"{example.stage} row {example.row}{side}", "bold").append(f"  {example.file}:{example.line}", "dim"))
        cut = f", {len(example.cut_ids):,} behind max_length {example.max_length:,} cut off" if example.cut_ids else ""
        template = example.origin.count("template")
        say(f"  {length:,} tokens, {in_loss:,} in the loss, {template:,} of the template{cut}")
        legend = Text("  in the loss", "green") if coloured else Text(f"  {marks[0]}in the loss{marks[1]}")
        say(legend.append("  ").append("content").append("  ").append("the template's", "dim"))
        say(_id_lines(example) if with_ids else _running(example, tokenizer, marks))
        for finding in example.findings:
            say(Text(f"  {finding['severity']}: ", "yellow").append(f"{finding['message']} [{finding['code']}]"))
        say("")


def _running(example: Example, tokenizer: Any, marks: tuple[str, str]) -> Text:
    """The tokens as running text, decoded together as far as they are alike, so that characters stay whole."""
    shown = Text()
    at, inside = 0, 0
    for (in_loss, origin), group in groupby(zip(example.mask, example.origin, strict=True)):
        count = len(list(group))
        if in_loss != inside:
            shown.append(marks[0] if in_loss else marks[1])
            inside = in_loss
        text = _safe(tokenizer.decode(example.ids[at : at + count]))
        shown.append(text, ("green" if in_loss else "") + (" dim" if origin == "template" else ""))
        at += count
    if inside:
        shown.append(marks[1])
    if example.cut_ids:
        shown.append(f"\n--- cut at max_length {example.max_length:,} ---\n", "red")
        shown.append(_safe(tokenizer.decode(example.cut_ids[:_LOST_SHOWN])), "dim strike")
        if len(example.cut_ids) > _LOST_SHOWN:
            shown.append(f" … and {len(example.cut_ids) - _LOST_SHOWN:,} more", "dim")
    return shown


def _id_lines(example: Example) -> Text:
    """A line for each token: its index, its id, whether it is in the loss, whose it is, and its text."""
    shown = Text()
    rows = zip(example.ids, example.mask, example.origin, example.tokens, strict=True)
    for at, (token, in_loss, origin, text) in enumerate(rows):
        words = f"{at:>6} {token:>7} {'loss' if in_loss else '    '} {origin or '?':<8} {printable(repr(text))}\n"
        shown.append(words, ("green" if in_loss else "") + (" dim" if origin == "template" else ""))
    if example.cut_ids:
        shown.append(f"--- cut at max_length {example.max_length:,}: {len(example.cut_ids):,} more ---\n", "red")
    return shown


def _safe(text: str) -> str:
    """Without characters that a terminal would act on; line breaks stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
