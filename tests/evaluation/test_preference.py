from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from pipeline.data.tokens import Completion, Pair, tokenize_pair
from pipeline.evaluation import preference
from pipeline.evaluation.beginning import remembers_keys_alone
from pipeline.evaluation.packed import packed_logits
from pipeline.evaluation.preference import (
    completion_logps,
    pair_logps,
    perplexity,
    perplexity_difference,
    preference_scores,
)

COMPLETIONS = [
    Completion([5, 6, 7], [8, 9]),
    Completion([11], [12, 13, 14, 15, 16, 17, 18]),
    Completion(list(range(20, 50)), [2]),
    Completion([], [5, 6, 7]),
    Completion([40, 41, 2, 2, 42], [2, 2]),  # pad tokens that are content
]


@torch.no_grad()
def logp(model: Any, completion: Completion) -> float:
    """The definition: one sequence, all logits, softmax in float64, tokens that something precedes."""
    ids = completion.prompt_ids + completion.completion_ids
    logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[at - 1, ids[at]]) for at in range(max(len(completion.prompt_ids), 1), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_logps_are_one_at_a_time(chat_model: Any, batch_size: int) -> None:
    logps = completion_logps(chat_model, COMPLETIONS, batch_size=batch_size)
    assert logps.dtype == torch.float32
    assert not logps.requires_grad
    assert logps.tolist() == pytest.approx([logp(chat_model, completion) for completion in COMPLETIONS], abs=1e-4)


def test_the_head_sees_completion_positions_only(chat_model: Any) -> None:
    """Prompts of 30 and 29 tokens, completions of 2 and 1: of 32 positions the head needs 28 to 31."""
    shapes = []
    chat_model.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2])))
    completion_logps(chat_model, [Completion([5] * 30, [6, 7]), Completion([5] * 29, [6])])
    assert shapes == [(2, 4)]


def test_a_forward_that_gives_all_logits(chat_model: Any) -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    plain = Plain(chat_model.config).eval()
    plain.load_state_dict(chat_model.state_dict())
    torch.testing.assert_close(completion_logps(plain, COMPLETIONS), completion_logps(chat_model, COMPLETIONS))


def test_modes_are_left_and_dropout_is_off(make_model: Callable[..., Any]) -> None:
    model = make_model(attention_dropout=0.5)
    expected = completion_logps(model, COMPLETIONS)
    model.train()
    assert torch.equal(completion_logps(model, COMPLETIONS), expected)
    assert model.training


def test_progress(chat_model: Any) -> None:
    counts: list[int] = []
    completion_logps(chat_model, COMPLETIONS, batch_size=2, progress=counts.append)
    assert counts == [2, 2, 1]


def test_pairs_keep_their_sides(chat_model: Any) -> None:
    pairs = [Pair([5, 6], [7], [8, 9, 10]), Pair([11, 12, 13], [14, 15], [16])]
    chosen, rejected = pair_logps(chat_model, pairs, batch_size=3)
    expected = [
        [logp(chat_model, Completion(p.prompt_ids, ids)) for p in pairs for ids in (p[side],)] for side in (1, 2)
    ]
    assert chosen.tolist() == pytest.approx(expected[0], abs=1e-4)
    assert rejected.tolist() == pytest.approx(expected[1], abs=1e-4)


def test_scores_by_hand() -> None:
    """β [(-1 - -2) - (-4 - -3)] = 0.5 · (1 + 1) = 1, and 0.5 · [(-5 - -5) - (-2 - -3)] = -0.5."""

    def fixed(chosen: list[float], rejected: list[float]) -> Callable[[Sequence[Pair]], Any]:
        return lambda pairs: (torch.tensor(chosen), torch.tensor(rejected))

    pairs = [Pair([1], [2], [3])] * 2
    scores = preference_scores(fixed([-1.0, -5.0], [-4.0, -2.0]), fixed([-2.0, -5.0], [-3.0, -3.0]), pairs, 0.5)
    assert scores.tolist() == [1.0, -0.5]


def test_equal_weights_have_no_margin(chat_model: Any, tiny_tokenizer: Any, texts: list[Any]) -> None:
    pairs = [tokenize_pair(tiny_tokenizer, row) for row in texts]
    scores = preference_scores(
        lambda pairs: pair_logps(chat_model, pairs), lambda pairs: pair_logps(chat_model, pairs), pairs, 0.1
    )
    assert scores.tolist() == [0.0, 0.0, 0.0]


def test_margins_are_the_trainers(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, preferences: list[Any]
) -> None:
    """`eval_rewards/margins` and `eval_rewards/accuracies` of TRL's trainer on the same rows."""
    policy, reference = make_model(seed=1), make_model(seed=2)
    columns = {name: [getattr(row, name) for row in preferences] for name in ("prompt", "chosen", "rejected")}
    dataset = Dataset.from_dict(columns)
    trainer = DPOTrainer(
        policy,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64, beta=0.3),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny_tokenizer,
    )
    metrics = trainer.evaluate()
    pairs = [pair for row in preferences if (pair := tokenize_pair(tiny_tokenizer, row, max_length=64)).chosen_ids]
    scores = preference_scores(
        lambda pairs: pair_logps(policy, pairs), lambda pairs: pair_logps(reference, pairs), pairs, 0.3
    )
    assert len(scores) == len(trainer.eval_dataset)
    assert float(scores.mean()) == pytest.approx(metrics["eval_rewards/margins"], abs=1e-4)
    assert float((scores > 0).float().mean()) == pytest.approx(metrics["eval_rewards/accuracies"])


def test_perplexity_of_a_model_that_knows_nothing(chat_model: Any) -> None:
    """All logits equal: every token has probability 1/V, and the perplexity is V whatever the rows."""
    torch.nn.init.zeros_(chat_model.lm_head.weight)
    vocabulary = chat_model.config.vocab_size
    logps = completion_logps(chat_model, COMPLETIONS)
    estimate = perplexity(logps.tolist(), [completion.scored_tokens for completion in COMPLETIONS], seed=0)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((vocabulary,) * 3, rel=1e-5)
    assert estimate.n == len(COMPLETIONS)


def test_perplexity_weighs_tokens_not_rows() -> None:
    """ln 2 nats on one token and 3 · ln 4 on three: exp((ln 2 + 3 ln 4) / 4) = 2^(7/4)."""
    estimate = perplexity([-math.log(2), -3 * math.log(4)], [1, 3], seed=0)
    assert estimate.value == pytest.approx(2**1.75)
    assert (estimate.low, estimate.high) == pytest.approx((2, 4))


def test_perplexity_difference_is_paired() -> None:
    """Rows that are hard for both: 1 nat a token less everywhere is a factor, e^-1, of every resample."""
    base = [-8.0, -2.0, -30.0]
    tokens = [2, 1, 5]
    estimate = perplexity_difference([-6.0, -1.0, -25.0], base, tokens, seed=0)
    whole = perplexity(base, tokens, seed=0)
    factor = math.exp(-1) - 1
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
        (factor * whole.value, factor * whole.high, factor * whole.low)
    )


def test_the_head_is_given_whole_rows(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of each row would have PyTorch copy the head's weights for every row of the batch."""
    whole: list[bool] = []
    head = chat_model.get_output_embeddings()
    stock = head.forward
    monkeypatch.setattr(head, "forward", lambda given: (whole.append(given.is_contiguous()), stock(given))[1])
    completion_logps(chat_model, [Completion([1, 2, 3], [4, 5]), Completion([6, 7, 8], [9, 1])])
    assert whole == [True]
    assert not head._forward_pre_hooks


def test_a_prompt_is_computed_once_for_both_completions(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same log-probabilities as of each completion behind a prompt of its own, of fewer tokens."""
    pairs = [
        Pair([5, 6, 7], [8, 9], [8, 10, 11, 12]),
        Pair(list(range(20, 50)), [2], [3]),
        Pair([40, 41, 2, 2, 42], [2, 2], [7] * 9),  # pad tokens that are content
        Pair([9], [4, 4, 4], []),
    ]
    each = [Completion(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    expected = completion_logps(chat_model, each, batch_size=1)
    computed: list[int] = []
    stock = chat_model.model.forward
    monkeypatch.setattr(
        chat_model.model, "forward", lambda **given: (computed.append(given["input_ids"].numel()), stock(**given))[1]
    )
    done: list[int] = []
    for batch_size in (1, 4, 8):
        chosen, rejected = pair_logps(
            chat_model, pairs, batch_size=batch_size, share_prompts=True, progress=done.append
        )
        torch.testing.assert_close(torch.stack([chosen, rejected], dim=1).flatten(), expected, rtol=0, atol=1e-4)
    assert done == [2, 2, 2, 2, 4, 4, 8]
    # The trial without padding and with it; then a pair at a time: what both share once, and no row's last token.
    assert computed[:2] == [6 + 15, 2 * 16]
    assert computed[2:6] == [4 + 3, 29 + 1 + 1, 4 + 2 + 9, 3]


def test_what_all_prompts_begin_with_is_computed_once(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same log-probabilities and logits, of fewer tokens; padding behind a beginning moves nothing."""
    system = list(range(20, 32))
    completions = [
        Completion([*system, 5, 6, 7], [8, 9]),
        Completion([*system, 5], [2]),
        Completion([*system, 40, 41, 2, 42], [7] * 9),
    ]
    pairs = [Pair(one.prompt_ids, one.completion_ids, [3, 4, 5]) for one in completions]
    seen: dict[int, torch.Tensor] = {}
    expected = completion_logps(chat_model, completions, batch_size=1, see=lambda at, own: seen.update({at: own}))
    each = torch.stack(pair_logps(chat_model, pairs, batch_size=2))
    computed: list[int] = []
    stock = chat_model.model.forward
    monkeypatch.setattr(
        chat_model.model, "forward", lambda **given: (computed.append(given["input_ids"].numel()), stock(**given))[1]
    )
    for batch_size in (1, 2, 3):
        ours: dict[int, torch.Tensor] = {}
        keep = ours.__setitem__
        logps = completion_logps(
            chat_model,
            completions,
            batch_size=batch_size,
            share_prompts=True,
            see=keep,
        )
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
        for at, logits in seen.items():
            torch.testing.assert_close(ours[at], logits, rtol=0, atol=1e-4)
        shared = torch.stack(pair_logps(chat_model, pairs, batch_size=batch_size, share_prompts=True))
        torch.testing.assert_close(shared, each, rtol=0, atol=1e-4)
    # A trial on 16 tokens; then all but the last tokens, the first 12 for each batch that has two rows.
    assert computed[2:5] == [12 + 4 + 8, 12 + 3 + 1, 12 + 1]


def test_a_model_with_windows_scores_each_completion_behind_its_own_prompt(chat_model: Any) -> None:
    pairs = [Pair([5, 6, 7], [8, 9], [10, 11])]
    expected = pair_logps(chat_model, pairs)
    chat_model.config.sliding_window = 4
    assert not remembers_keys_alone(chat_model)
    shared = pair_logps(chat_model, pairs, share_prompts=True)
    assert torch.equal(torch.stack(shared), torch.stack(expected))


def test_rows_that_a_model_reads_otherwise_are_padded(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = completion_logps(chat_model, COMPLETIONS)

    def wrong(*args: Any) -> list[torch.Tensor] | None:
        logits = packed_logits(*args)
        return None if logits is None else [own * 1.1 for own in logits]

    monkeypatch.setattr(preference, "packed_logits", wrong)
    assert torch.equal(completion_logps(chat_model, COMPLETIONS, share_prompts=True), expected)
    monkeypatch.setattr(preference, "packed_logits", lambda *args: None)  # or does not read at all
    assert torch.equal(completion_logps(chat_model, COMPLETIONS, share_prompts=True), expected)

    def unknown(*args: Any) -> None:
        raise TypeError("got an unexpected keyword argument 'joint'")

    monkeypatch.setattr(preference, "packed_logits", unknown)
    assert torch.equal(completion_logps(chat_model, COMPLETIONS, share_prompts=True), expected)
    assert chat_model.config._attn_implementation == "sdpa"


def test_a_layer_that_does_not_read_the_joint_row_is_noticed(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row reads the same then, and two completions behind one prompt would see each other."""
    pairs = [Pair([5, 6, 7], [8, 9], [10, 11])]
    expected = pair_logps(chat_model, pairs)
    layer = chat_model.model.layers[0].self_attn
    stock = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda *args, joint=None, **given: stock(*args, **{**given, "attention_mask": None})
    )
    assert torch.equal(torch.stack(pair_logps(chat_model, pairs, share_prompts=True)), torch.stack(expected))
