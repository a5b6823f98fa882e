from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pipeline.data.tokenised import Counted
from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model.base import find_base
from pipeline.plan.rhythm import (
    Length,
    Rows,
    Steps,
    checkpoints_kept,
    count_rows,
    largest_batch,
    pair_length,
    steps_of,
)
from pipeline.plan.trace import Batch


def settings(**changes: Any) -> Any:
    """What of TRL's configuration counts here, with defaults for all of it."""
    values = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "dataloader_drop_last": False,
        "max_length": 512,
        "pad_to_multiple_of": None,
        "save_steps": 500,
        "save_total_limit": None,
        **changes,
    }
    return SimpleNamespace(save_strategy=SimpleNamespace(value=values.pop("save_strategy", "epoch")), **values)


def test_a_thousand_rows_at_an_effective_batch_of_four_for_three_epochs_are_750_steps() -> None:
    assert steps_of(1000, settings(num_train_epochs=3.0)) == Steps(750, 250)
    accumulated = settings(train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3.0)
    assert steps_of(1000, accumulated) == Steps(750, 250)


class _Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x - 1).square().mean()}


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (10, {"per_device_train_batch_size": 4}),
        (12, {"per_device_train_batch_size": 4, "num_train_epochs": 2}),
        (10, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}),
        (11, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 2}),
        (10, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1.5}),
        (7, {"per_device_train_batch_size": 2, "num_train_epochs": 0.3}),
        (7, {"per_device_train_batch_size": 2, "num_train_epochs": 2.2, "save_total_limit": 2}),
        (3, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 2}),
        (10, {"per_device_train_batch_size": 4, "max_steps": 7}),
        (10, {"per_device_train_batch_size": 4, "num_train_epochs": 2, "dataloader_drop_last": True}),
        (10, {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}),
        (10, {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}),
        (10, {"per_device_train_batch_size": 2, "save_strategy": "no"}),
    ],
    ids=str,
)
def test_steps_and_checkpoints_are_those_of_a_trainer_that_runs(
    rows: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "epoch", **changes},
    )
    data = [{"x": torch.ones(1)} for _ in range(rows)]
    trainer = Trainer(model=_Line(), args=args, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    steps = steps_of(rows, args)
    assert steps.total == trainer.state.max_steps == trainer.state.global_step
    # The trainer counts a step that gathers fewer batches as that much of an epoch; the plan counts whole steps.
    assert steps.epochs == pytest.approx(trainer.state.epoch, abs=1 / (steps.per_epoch or 1))
    assert checkpoints_kept(steps, args) == len(list(tmp_path.glob("checkpoint-*")))


def test_without_rows_only_max_steps_tells_the_steps() -> None:
    assert steps_of(None, settings()) == Steps(None, None)
    assert steps_of(None, settings()).epochs is None
    assert steps_of(None, settings(max_steps=7)) == Steps(7, None)
    assert checkpoints_kept(Steps(7, None), settings(save_strategy="steps", save_steps=2)) == 4
    assert checkpoints_kept(Steps(7, None), settings()) is None
    assert checkpoints_kept(Steps(None, None), settings(save_total_limit=2)) == 2


def test_the_largest_batch_has_the_longest_row_and_the_most_positions() -> None:
    sizes = ((10, 5), (31, 2), (12, 9), (8, 8))
    rows = Rows((), "rows.jsonl", 4, Counted(used=4), tuple(Length(*size, (size[0],)) for size in sizes))
    assert largest_batch(rows, settings(train_batch_size=2), dpo=False) == Batch(2, 31, 17, ((12,), (31,)))
    assert largest_batch(rows, settings(train_batch_size=2), dpo=True).padded() == Batch(4, 31, 17)
    everything = Batch(4, 31, 24, ((8,), (10,), (12,), (31,)))
    assert largest_batch(rows, settings(train_batch_size=9), dpo=False) == everything
    assert (everything.tokens, everything.padded().tokens) == (61, 124)
    one = largest_batch(rows, settings(train_batch_size=1, pad_to_multiple_of=8), dpo=False)
    assert one == Batch(1, 32, 9, ((31,),))


def test_a_pair_takes_what_it_shares_once_and_its_last_tokens_not_at_all() -> None:
    """A prompt of three tokens, then 7 9 and 7 8 8: the common 7 predicts two tokens, and stands in both branches."""
    assert pair_length([1, 2, 3], [7, 9], [7, 8, 8]) == Length(6, 5, (3, 1, 2))


def test_max_length_stands_in_for_lengths_that_are_not_known() -> None:
    assert largest_batch(Rows(()), settings(), dpo=True) == Batch(8, 512, 8 * 512, ((0, 512, 512),) * 4)
    assert largest_batch(Rows((), "rows.jsonl", 3), settings(), dpo=False) == Batch(3, 512, 3 * 512, ((512,),) * 3)


def test_demonstrations_are_counted_as_the_stage_counts_them(
    write_experiment: Callable[..., Path], tiny_tokenizer: Any, tiny_data: dict[str, Path]
) -> None:
    one = load_experiment(write_experiment()).experiment
    rows = count_rows(one, "sft", find_base(one.model))
    conversations = [json.loads(line)["messages"] for line in tiny_data["demonstrations"].read_text().splitlines()]
    ids = [tiny_tokenizer.apply_chat_template(some, return_dict=True)["input_ids"] for some in conversations]
    assert [length.sequence for length in rows.lengths] == [len(some) for some in ids]
    assert rows.counted is not None
    assert (rows.rows, rows.used, rows.counted.tokens) == (12, 12, sum(map(len, ids)))
    assert rows.counted.loss_tokens == sum(length.positions for length in rows.lengths)
    assert "12 rows" in rows.account[0]


def test_a_pair_counts_its_longer_sequence_and_both_completions(
    write_experiment: Callable[..., Path], tiny_tokenizer: Any, tiny_data: dict[str, Path]
) -> None:
    one = load_experiment(write_experiment()).experiment
    rows = count_rows(one, "dpo", find_base(one.model))
    first = json.loads(tiny_data["preferences"].read_text().splitlines()[0])

    def length(completion: str) -> int:
        messages = first["prompt"] + first[completion]
        return len(tiny_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    prompt = len(
        tiny_tokenizer.apply_chat_template(first["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    chosen, rejected = length("chosen"), length("rejected")
    assert rows.lengths[0][:2] == (max(chosen, rejected), chosen + rejected - 2 * prompt)
    shared, *branches = rows.lengths[0].parts
    assert shared >= prompt - 1
    assert 2 * shared + sum(branches) == chosen + rejected - 2  # a sequence's last token predicts nothing


def test_a_file_that_is_not_there_leaves_the_rows_unknown(write_experiment: Callable[..., Path]) -> None:
    one = load_experiment(write_experiment(data={"demonstrations": {"train": "gone.jsonl"}})).experiment
    rows = count_rows(one, "sft", find_base(one.model))
    assert (rows.rows, rows.used, rows.counted) == (None, None, None)
    assert "gone.jsonl" in rows.account[0]


def test_rows_that_training_would_refuse_are_refused(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n', encoding="utf-8")
    one = load_experiment(write_experiment(data={"demonstrations": {"train": str(bad)}})).experiment
    with pytest.raises(PipelineError, match="1 of 1 rows"):
        count_rows(one, "sft", find_base(one.model))
    short = load_experiment(write_experiment(sft={"max_length": 4})).experiment
    with pytest.raises(PipelineError, match="cannot be trained on"):
        count_rows(short, "sft", find_base(short.model))
