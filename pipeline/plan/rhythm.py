"""Rows, tokens and steps of a stage, counted as the stage itself counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.check import CheckedRows, load_rows
from pipeline.data.masks import IGNORED
from pipeline.data.tokenised import Counted, label_demonstrations, require_usable, tokenize_preferences
from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Experiment
from pipeline.model.base import BaseFiles, load_tokenizer
from pipeline.plan.outline import holds_tokenizer
from pipeline.plan.trace import Batch
from pipeline.runs.run import Stage
from pipeline.training.account import say_counts
from pipeline.training.engine.joint import joint_sizes


class Length(NamedTuple):
    """What a row takes."""

    sequence: int
    """Tokens of its (longest) sequence."""
    positions: int
    """Positions in the loss."""
    parts: tuple[int, ...]
    """What the engine computes of it: a demonstration's tokens; of a pair, those of `joint_sizes`."""


def demonstration_length(row: dict[str, Any]) -> Length:
    """Of a labelled demonstration."""
    tokens = len(row["input_ids"])
    return Length(tokens, sum(label != IGNORED for label in row["labels"]), (tokens,))


def pair_length(prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]) -> Length:
    """Of a tokenised preference."""
    chosen, rejected = prompt_ids + chosen_ids, prompt_ids + rejected_ids
    longest = max(len(chosen), len(rejected))
    return Length(longest, len(chosen_ids) + len(rejected_ids), joint_sizes(chosen, rejected))


def unknown_length(max_length: int, *, dpo: bool) -> Length:
    """The most that a row can take: all of it in the loss, and nothing shared."""
    sequences = 2 if dpo else 1
    return Length(max_length, sequences * max_length, (0, max_length, max_length) if dpo else (max_length,))


@dataclass(frozen=True)
class Rows:
    """The training rows of a stage, as far as they are known."""

    account: tuple[str, ...]
    """For a person: what is known of them, or why they are not known."""
    file: str | None = None
    rows: int | None = None
    """Proven ones in the file."""
    counted: Counted | None = None
    """What tokenising does to them."""
    lengths: tuple[Length, ...] = ()
    """Of each row that is used."""

    @property
    def used(self) -> int | None:
        """How many are trained on: all of them, where they were not tokenised."""
        return self.rows if self.counted is None else self.counted.used


def count_rows(experiment: Experiment, stage: Stage, files: BaseFiles) -> Rows:
    """The training rows of `stage`, tokenised where the tokenizer is at hand.

    Raises:
        PipelineError: rows that training would refuse. A file that is not there is no error here.
    """
    split = experiment.data.demonstrations if stage == "sft" else experiment.data.preferences
    if split is None:
        return Rows(("rows: not known, the experiment names no file to train on",))
    aside = experiment.data.on_invalid == "set-aside"
    rows: CheckedRows[Any]
    try:
        kind = "demonstration" if stage == "sft" else "preference"
        rows = load_rows(Path(split.train), kind, set_aside=aside, columns=split.map)
    except PipelineError as error:
        if error.exit_code is not ExitCode.USAGE:
            raise
        return Rows((f"rows: not known, {split.train}: {error.message}",), split.train)
    if not holds_tokenizer(files):
        why = f"rows: {len(rows):,}, not tokenised: the tokenizer of {files.id} is not at hand"
        return Rows((why,), split.train, len(rows))
    tokenizer = load_tokenizer(files, experiment.model, experiment.tokenizer.chat_template)
    if stage == "sft":
        labelled, counted = label_demonstrations(tokenizer, rows, experiment.sft.max_length)
        lengths = [demonstration_length(row) for row in labelled]
    else:
        pairs, counted = tokenize_preferences(tokenizer, rows, experiment.dpo.max_length)
        lengths = [pair_length(*pair) for pair in pairs]
    require_usable([counted], stage, experiment.data.on_invalid)
    account: list[str] = []
    say_counts(account.append, "train", counted, rows.set_aside + counted.set_aside)
    return Rows(tuple(account), split.train, len(rows), counted, tuple(lengths))


def largest_batch(rows: Rows, args: Any, *, dpo: bool) -> Batch:
    """The batch that takes the most memory; `max_length` stands in for lengths that are not known.

    Without padding, it is the one of the rows with the most tokens.

    Args:
        rows: those that are trained on.
        args: TRL's configuration of the stage.
        dpo: whether a row is a pair, two sequences.
    """
    count = min(args.train_batch_size, rows.used or args.train_batch_size)
    sequences = count * (2 if dpo else 1)
    lengths = rows.lengths or (unknown_length(args.max_length, dpo=dpo),) * count
    longest = max(length.sequence for length in lengths)
    positions = sum(sorted(length.positions for length in lengths)[-count:])
    parts = sorted((length.parts for length in lengths), key=sum)[-count:]
    multiple = args.pad_to_multiple_of or 1
    return Batch(sequences, math.ceil(longest / multiple) * multiple, positions, tuple(parts))


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a stage; None where the rows are not known."""

    total: int | None
    per_epoch: int | None

    @property
    def epochs(self) -> float | None:
        """How many times the rows are gone through."""
        return None if self.total is None or self.per_epoch is None else self.total / self.per_epoch


def steps_of(rows: int | None, args: Any) -> Steps:
    """The steps that Transformers' Trainer takes (`set_initial_training_values`), on one device.

    An epoch's last batch may be smaller, and its last step may gather fewer batches; both are done all the same.
    `max_steps` overrides the epochs, which may be a fraction.

    Args:
        rows: those that are trained on; None: not known.
        args: TRL's configuration of the stage.
    """
    if rows is None:
        return Steps(args.max_steps if args.max_steps > 0 else None, None)
    batches = rows // args.train_batch_size if args.dataloader_drop_last else math.ceil(rows / args.train_batch_size)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return Steps(args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch)


def checkpoints_kept(steps: Steps, args: Any) -> int | None:
    """How many checkpoints a finished run holds; None where that depends on rows that are not known."""
    strategy, limit = args.save_strategy.value, args.save_total_limit
    made: int | None = None
    if strategy == "no":
        return 0
    if strategy == "steps" and steps.total is not None:
        made = math.ceil(steps.total / args.save_steps)  # the last step is saved in any case
    elif strategy == "epoch" and steps.epochs is not None:
        made = math.ceil(steps.epochs)
    return min((count for count in (made, limit) if count is not None), default=None)
