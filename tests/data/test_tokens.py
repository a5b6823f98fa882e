"""Held to the columns that TRL's own trainers prepare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from pipeline.data.rows import Preference
from pipeline.data.tokens import Completion, Pair, encode, tokenize_pair

# A template that ends the generation prompt with what a whole conversation does not have there.
THINKING = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n(thinks){% endif %}"
)


MAX_LENGTH = 64
HI = [{"role": "user", "content": "Hi"}]
HELLO = [{"role": "assistant", "content": "Hello"}]


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": MAX_LENGTH,
    }


@pytest.mark.parametrize("template", [None, THINKING], ids=["chatml", "thinking"])
def test_pairs_are_the_trainers(
    make_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    preferences: list[Any],
    template: str | None,
) -> None:
    rows = preferences
    chatml = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = template or chatml
    try:
        columns = {name: [getattr(row, name) for row in rows] for name in ("prompt", "chosen", "rejected")}
        trainer = DPOTrainer(
            make_model(seed=1),
            ref_model=make_model(seed=2),
            args=DPOConfig(**arguments(tmp_path)),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tiny_tokenizer,
        )
        pairs = [tokenize_pair(tiny_tokenizer, row, max_length=MAX_LENGTH) for row in rows]
        untruncated = [tokenize_pair(tiny_tokenizer, row) for row in rows]
    finally:
        tiny_tokenizer.chat_template = chatml

    prepared = [Pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    assert untruncated[:2] == prepared  # the third row's prompt fills the length: the trainer drops it
    assert pairs[2].chosen_ids == pairs[2].rejected_ids == []
    assert len(pairs[2].prompt_ids) == MAX_LENGTH

    # The trainer truncates in its collator.
    batch = trainer.data_collator(list(trainer.train_dataset))
    for row, pair in enumerate(pairs[:2]):
        for ids, half in ((pair.chosen_ids, 0), (pair.rejected_ids, 2)):
            length = int(batch["attention_mask"][half + row].sum())
            assert batch["input_ids"][half + row, :length].tolist() == pair.prompt_ids + ids
            assert int(batch["completion_mask"][half + row].sum()) == len(ids)


def test_max_length_cuts_the_end(tiny_tokenizer: Any, conversations: list[Any]) -> None:
    row = conversations[0]
    whole = tokenize_pair(tiny_tokenizer, row)
    start = len(whole.prompt_ids)
    cut = tokenize_pair(tiny_tokenizer, row, max_length=start + 2)
    assert cut == Pair(whole.prompt_ids, whole.chosen_ids[:2], whole.rejected_ids[:2])
    assert tokenize_pair(tiny_tokenizer, row, max_length=start - 1) == Pair(whole.prompt_ids[:-1], [], [])


def test_the_stop_token_is_part_of_the_completion(tiny_tokenizer: Any) -> None:
    """pad is eos here: a mask made by comparing ids would lose it."""
    pair = tokenize_pair(tiny_tokenizer, Preference(HI, HELLO, HELLO))
    assert tiny_tokenizer.decode(pair.chosen_ids) == "Hello<|im_end|>\n"
    text = tokenize_pair(tiny_tokenizer, Preference("Hi", " you", " you"))
    assert text.chosen_ids[-1] == tiny_tokenizer.eos_token_id


def test_tools_reach_the_template(tiny_tokenizer: Any, conversations: list[Any]) -> None:
    chatml = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{{ tools[0].function.name if tools else 'none' }}" + chatml
    try:
        tool = {"type": "function", "function": {"name": "restart", "parameters": {}}}
        for tools, name in (
            (None, "none"),
            ([tool], "restart"),
            ('[{"function": {"name": "restart"}}]', "restart"),
        ):
            text = tiny_tokenizer.decode(encode(tiny_tokenizer, HI, tools=tools))
            assert text == f"{name}<|im_start|>user\nHi<|im_end|>\n"
            row = dataclasses.replace(conversations[0], tools=tools)
            assert tiny_tokenizer.decode(tokenize_pair(tiny_tokenizer, row).prompt_ids).startswith(name)
    finally:
        tiny_tokenizer.chat_template = chatml


@pytest.mark.parametrize(("prompt", "scored"), [([1], 3), ([], 2)])
def test_a_first_token_without_a_prompt_is_not_scored(prompt: list[int], scored: int) -> None:
    assert Completion(prompt, [5, 6, 7]).scored_tokens == scored
    assert Completion(prompt, []).scored_tokens == 0
