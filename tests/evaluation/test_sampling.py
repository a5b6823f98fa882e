"""Drawn answers: the right tokens with the right frequency, repeatable, and each prompt's own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from pipeline.evaluation.generation import Sampling, _chooser, generate

PROMPTS = [[{"role": "user", "content": text}] for text in ("Is it on fire?", "Hi", "It works again!")]


def test_tokens_are_drawn_with_their_probability() -> None:
    logits = torch.tensor([0.5, 0.1, 0.4]).log()
    choose = _chooser(Sampling(1.0, 1.0, seed=1), 0)
    counts = Counter(choose(logits) for _ in range(4000))
    # Three standard errors of a share of a half over 4,000 draws are 0.024.
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.024)
    assert counts[1] / 4000 == pytest.approx(0.1, abs=0.024)


def test_temperature_sharpens_and_top_p_cuts() -> None:
    logits = torch.tensor([0.5, 0.1, 0.4]).log()
    cold = _chooser(Sampling(0.05, 1.0, seed=1), 0)
    assert {cold(logits) for _ in range(100)} <= {0, 2}
    assert Counter(cold(logits) for _ in range(200))[0] > 190
    nucleus = _chooser(Sampling(1.0, 0.6, seed=1), 0)  # 0.5 is less than 0.6, 0.9 is not
    assert {nucleus(logits) for _ in range(200)} == {0, 2}
    first = _chooser(Sampling(1.0, 0.45, seed=1), 0)
    assert {first(logits) for _ in range(200)} == {0}


def test_the_seed_decides_and_the_batch_does_not(chat_model: Any, tiny_tokenizer: Any) -> None:
    def texts(seed: int, batch_size: int) -> list[str]:
        answers = generate(
            chat_model, tiny_tokenizer, PROMPTS,
            max_new_tokens=8, batch_size=batch_size, sampling=Sampling(1.0, 1.0, seed),
        )  # fmt: skip
        return [answer.text for answer in answers]

    assert texts(3, 1) == texts(3, 3) == texts(3, 2)
    assert texts(3, 1) != texts(4, 1)
    greedy = generate(chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=3)
    cold = generate(
        chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=3, sampling=Sampling(1e-4, 1.0, 3)
    )
    assert cold == greedy
