"""The regression set: whole, well-formed, and read as the model's own template or as plain text."""

from __future__ import annotations

from typing import Any

from pipeline.data.check import load_rows
from pipeline.evaluation.runs import _GENERAL, _general


def test_thirty_different_questions_with_answers() -> None:
    rows = load_rows(_GENERAL, "demonstration").rows
    asked = [[turn["content"] for turn in row.messages or []] for row in rows]
    assert len(asked) == 30
    assert all(len(turns) == 2 for turns in asked)
    assert len({question for question, _ in asked}) == len({answer for _, answer in asked}) == 30
    assert max(len(" ".join(turns).split()) for turns in asked) <= 40  # it is meant to cost a second or two


def test_it_is_cut_like_every_row_and_needs_no_chat_template(tiny_tokenizer: Any) -> None:
    completions = _general(tiny_tokenizer, 512)
    assert len(completions) == 30
    assert "capital of Portugal is Lisbon" in tiny_tokenizer.decode(completions[0].completion_ids)
    assert max(len(one.prompt_ids) + len(one.completion_ids) for one in _general(tiny_tokenizer, 40)) <= 40
    template, tiny_tokenizer.chat_template = tiny_tokenizer.chat_template, None
    try:
        plain = _general(tiny_tokenizer, 512)[0]
    finally:
        tiny_tokenizer.chat_template = template
    assert tiny_tokenizer.decode(plain.prompt_ids) == "What is the capital of Portugal?\n"
    assert tiny_tokenizer.decode(plain.completion_ids).startswith("The capital of Portugal is Lisbon.")
