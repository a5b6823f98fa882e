"""Answers that begin from what scoring computed of their prompts: the same answers, of fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.data.tokens import Completion, encode
from pipeline.evaluation import known_prompts
from pipeline.evaluation.generation import Answer, Sampling, generate
from pipeline.evaluation.known_prompts import KnownPrompts
from pipeline.evaluation.preference import completion_logps

TEXTS = ("Hi", "The printer is on fire.", "a", "It works again, thank you! " * 3, "fire?", "on", "again")
SYSTEM = {"role": "system", "content": "Answer the report in one word."}
ALONE = [[{"role": "user", "content": text}] for text in TEXTS]
BEHIND_ONE = [[SYSTEM, *prompt] for prompt in ALONE]
CPU = torch.device("cpu")


@pytest.fixture
def calls(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of what each call of the model computes."""
    return watched(chat_model.model, monkeypatch)


def watched(inner: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    stock = inner.forward

    def forward(input_ids: torch.Tensor, **given: Any) -> Any:
        found.append((input_ids.shape[0], input_ids.shape[1]))
        return stock(input_ids=input_ids, **given)

    monkeypatch.setattr(inner, "forward", forward)
    return found


def scored(model: Any, tokenizer: Any, prompts: Sequence[Any], batch_size: int = 3) -> KnownPrompts:
    """The prompts, as they are known when something behind them was scored."""
    known = KnownPrompts(CPU)
    rows = [
        Completion(encode(tokenizer, prompt, add_generation_prompt=True), [7 + at, 8, 9])
        for at, prompt in enumerate(prompts)
    ]
    logps = completion_logps(model, rows, batch_size=batch_size, share_prompts=True, known=known)
    expected = completion_logps(model, rows, batch_size=batch_size)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
    return known


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    known: KnownPrompts | None,
    sampling: Sampling | None = None,
    batch_size: int = 4,
) -> list[Answer]:
    return generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size, sampling=sampling, known=known)


def test_nothing_of_a_known_prompt_is_computed_again(
    chat_model: Any, tiny_tokenizer: Any, calls: list[tuple[int, int]]
) -> None:
    known = scored(chat_model, tiny_tokenizer, BEHIND_ONE)
    calls.clear()
    answers(chat_model, tiny_tokenizer, BEHIND_ONE, known)
    assert calls[0] == (4, 1)
    assert {tokens for _, tokens in calls} == {1}
    calls.clear()
    answers(chat_model, tiny_tokenizer, BEHIND_ONE, None)
    assert max(tokens for _, tokens in calls) > 30


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0.9, seed=3)])
@pytest.mark.parametrize("prompts", [ALONE, BEHIND_ONE, list(TEXTS)])
@pytest.mark.parametrize("batch_size", [1, 4, 25])
def test_answers_are_the_same(
    chat_model: Any, tiny_tokenizer: Any, prompts: Any, sampling: Sampling | None, batch_size: int
) -> None:
    known = scored(chat_model, tiny_tokenizer, prompts)
    expected = answers(chat_model, tiny_tokenizer, prompts, None, sampling, batch_size)
    assert answers(chat_model, tiny_tokenizer, prompts, known, sampling, batch_size) == expected
    assert len({answer.text for answer in expected}) > 2


def test_positions_go_on_behind_a_known_prompt(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative and forgive a shift; GPT-2's are absolute."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **shape)).eval()
    known = scored(model, tiny_tokenizer, BEHIND_ONE)
    expected = answers(model, tiny_tokenizer, BEHIND_ONE, None)
    calls = watched(model.transformer, monkeypatch)
    assert answers(model, tiny_tokenizer, BEHIND_ONE, known) == expected
    assert {tokens for _, tokens in calls} == {1}


def test_a_batch_with_an_unknown_prompt_is_computed(
    chat_model: Any, tiny_tokenizer: Any, calls: list[tuple[int, int]]
) -> None:
    """The unknown prompt is the longest: of two batches the first is computed, the second is not."""
    known = scored(chat_model, tiny_tokenizer, [prompt for at, prompt in enumerate(ALONE) if at != 3])
    expected = answers(chat_model, tiny_tokenizer, ALONE, None)
    calls.clear()
    assert answers(chat_model, tiny_tokenizer, ALONE, known) == expected
    assert [rows for rows, tokens in calls if tokens > 1] == [4]


@pytest.mark.parametrize("free", [0, 20_000, None])
def test_nothing_is_kept_where_it_does_not_fit(
    chat_model: Any,
    tiny_tokenizer: Any,
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
) -> None:
    """A row of three prompts takes some 100 tokens of 256 bytes; a tenth of 20,000 holds 7."""
    monkeypatch.setattr(known_prompts, "available_memory", lambda device: free)
    known = scored(chat_model, tiny_tokenizer, ALONE)
    assert not known.keeps
    calls.clear()
    expected = answers(chat_model, tiny_tokenizer, ALONE, None)
    today = list(calls)
    calls.clear()
    assert answers(chat_model, tiny_tokenizer, ALONE, known) == expected
    assert calls == today


def test_what_fits_is_what_is_kept(
    chat_model: Any, tiny_tokenizer: Any, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the keys of the longest three prompts' row, whose completions take none, and not a token more."""
    config = chat_model.config
    width = config.head_dim * config.num_key_value_heads
    each = 4 * 2 * config.num_hidden_layers * width
    lengths = sorted((len(encode(tiny_tokenizer, one, add_generation_prompt=True)) for one in ALONE), reverse=True)
    tokens = sum(lengths[:3])
    monkeypatch.setattr(known_prompts, "available_memory", lambda device: 10 * each * tokens)
    known = scored(chat_model, tiny_tokenizer, ALONE)
    calls.clear()
    answers(chat_model, tiny_tokenizer, ALONE, known, batch_size=3)
    firsts = [rows for rows, tokens in calls if tokens > 1]
    assert calls[0] == (3, 1)
    assert firsts == [3, 1]
    monkeypatch.setattr(known_prompts, "available_memory", lambda device: 10 * each * tokens - 10)
    known = scored(chat_model, tiny_tokenizer, ALONE)
    calls.clear()
    answers(chat_model, tiny_tokenizer, ALONE, known, batch_size=3)
    assert calls[0][1] > 1


def test_models_that_remember_more_than_keys_go_their_own_way(
    make_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.config.sliding_window = 4
    calls = watched(model.model, monkeypatch)
    expected = answers(model, tiny_tokenizer, BEHIND_ONE, None)
    today = list(calls)
    assert today[0][0] == 4  # nor is what the prompts begin with computed by itself
    known = scored(model, tiny_tokenizer, BEHIND_ONE)
    calls.clear()
    assert answers(model, tiny_tokenizer, BEHIND_ONE, known) == expected
    assert calls == today


def test_a_cache_of_another_kind_is_not_kept(chat_model: Any, tiny_tokenizer: Any) -> None:
    class Layer:
        keys = values = torch.zeros(1, 1, 9, 4)

    class Cache:
        layers = (Layer(),)

    for cache in (Cache(), None, object()):
        known = KnownPrompts(CPU)
        assert known.keeps
        known.add(cache, [[5, 6]], [torch.tensor([0, 1])])
        assert not known.keeps
        assert known.beginning([[5, 6]]) is None
