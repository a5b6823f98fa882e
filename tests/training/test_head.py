from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from transformers import AutoModelForCausalLM
from trl.kernels import chunked_logprob

from pipeline.training.engine import head
from pipeline.training.engine.head import compact_head


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    trl_utils.add_fused_lm_head(loaded, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return loaded


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of 20, the second padded from 15 on; 6 and 4 positions in the loss."""
    torch.manual_seed(1)
    ids = torch.randint(3, 250, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 14:20] = ids[0, 14:20]
    labels[1, 11:15] = ids[1, 11:15]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def projected(model: Any, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """TRL's output, and how many positions went through its head."""
    counted = []
    apply = trl_utils._ChunkedLogProbFunction.apply

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            counted.append(hidden.shape[0])
            return apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    output = model(**batch, fused_lm_head=True)
    monkeypatch.undo()
    return output, sum(counted)


def test_only_positions_in_the_loss_are_projected_and_nothing_changes(
    model: Any, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, everywhere = projected(model, batch, monkeypatch)
    with compact_head(torch.device("cpu")):
        compact, on_labels = projected(model, batch, monkeypatch)
    assert (everywhere, on_labels) == (2 * 19, 10)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(getattr(plain, name), getattr(compact, name), atol=1e-5), name
    assert torch.equal(plain.is_top1.bool(), compact.is_top1.bool())


def test_gradients_are_the_same(model: Any, batch: dict[str, torch.Tensor]) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    # More positions than a tile holds.
    batch = {name: tensor.repeat(16, 1) for name, tensor in batch.items()}
    assert int((batch["labels"] != -100).sum()) > head._CPU_TOKENS
    plain = gradients()
    with compact_head(torch.device("cpu")):
        compact = gradients()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, compact[name], rtol=1e-4, atol=1e-4), name


def test_trl_is_as_it_was_afterwards() -> None:
    def settings() -> tuple[Any, ...]:
        return trl_utils._use_triton, trl_utils._ChunkedLogProbFunction, chunked_logprob.TOKEN_CHUNK_SIZE

    before = settings()
    with compact_head(torch.device("cuda")):
        assert trl_utils._use_triton(torch.device("cpu"))
        assert before[1:] == settings()[1:]
    assert settings() == before
    with suppress(KeyError), compact_head(torch.device("cpu")):
        assert chunked_logprob.TOKEN_CHUNK_SIZE == head._CPU_TOKENS
        assert trl_utils._ChunkedLogProbFunction is not before[1]
        raise KeyError
    assert settings() == before


Scores = tuple[torch.Tensor | None, ...]
ALL = chunked_logprob.OPTIONAL_OUTPUTS


def scored(
    made: dict[str, Any], *, ours: bool, rounds: bool = False, outputs: tuple[str, ...] = ALL, **given: Any
) -> tuple[Scores, torch.Tensor]:
    """Every score of TRL's head or of ours, and the gradient of a sum of log-probabilities with weights."""
    hidden = made["hidden"].clone().requires_grad_()
    rest = (made["weight"], made.get("bias"), made["targets"], given.get("temperature", 1.0), 97)
    rest = (*rest, given.get("cap"), given.get("scale", 1.0), outputs)
    with compact_head(torch.device("cpu"), rounds=rounds) if ours else nullcontext():
        found = trl_utils._ChunkedLogProbFunction.apply(hidden, *rest)
    (found[0] * made["weights"]).sum().backward()
    assert hidden.grad is not None
    return tuple(None if one is None else one.detach() for one in found), hidden.grad


@pytest.fixture
def made() -> dict[str, Any]:
    """A frozen head of 301 words, and more tokens than a tile holds."""
    torch.manual_seed(2)
    count = head._CPU_TOKENS + 21
    return {
        "hidden": torch.randn(count, 24),
        "weight": torch.randn(301, 24) / 2,
        "targets": torch.randint(0, 301, (count,)),
        "weights": torch.rand(count) - 0.3,
    }


@pytest.mark.parametrize("given", [{}, {"cap": 3.0}, {"scale": 0.25}, {"temperature": 0.7, "cap": 5.0, "scale": 1.5}])
@pytest.mark.parametrize("biased", [False, True])
def test_a_frozen_head_gives_trls_scores_and_gradients(
    made: dict[str, Any], given: dict[str, float], biased: bool
) -> None:
    if biased:
        made["bias"] = torch.randn(301)
    stock, stock_gradient = scored(made, ours=False, **given)
    own, gradient = scored(made, ours=True, **given)
    for name, theirs, one in zip(head._SCORES, stock, own, strict=True):
        assert theirs is not None
        assert one is not None
        assert theirs.dtype == one.dtype, name
        assert torch.allclose(theirs.float(), one.float(), rtol=1e-5, atol=1e-5), name
    assert torch.allclose(stock_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_computed(made: dict[str, Any]) -> None:
    found, _ = scored(made, ours=True, outputs=("entropy",))
    assert [one is not None for one in found] == [True, True, False, False, False]
    with compact_head(torch.device("cpu")), head.log_probs_alone():
        alone = trl_utils._ChunkedLogProbFunction.apply(
            made["hidden"], made["weight"], None, made["targets"], 1.0, 97, None, 1.0, ALL
        )
    assert [one is not None for one in alone] == [True, False, False, False, False]
    assert torch.equal(alone[0], found[0])  # a reference at the start is the policy, to the bit


def test_of_equal_logits_the_first_is_the_hit(made: dict[str, Any]) -> None:
    made["weight"][200] = made["weight"][100] = 9 * made["hidden"][0]
    made["hidden"][1] = made["hidden"][0]
    made["targets"][:2] = torch.tensor([100, 200])
    for ours in (False, True):
        top = scored(made, ours=ours)[0][-1]
        assert top is not None
        assert top[:2].tolist() == [True, False]


def test_rounding_touches_gradients_alone(made: dict[str, Any]) -> None:
    exact, gradient = scored(made, ours=True)
    rounded, near = scored(made, ours=True, rounds=True)
    assert all(torch.equal(one, other) for one, other in zip(exact, rounded, strict=True) if one is not None)
    apart = float((near - gradient).norm() / gradient.norm())
    assert 1e-6 < apart < 1e-2


def test_a_head_that_trains_is_trls(made: dict[str, Any]) -> None:
    weights = []
    for ours in (False, True):
        made["weight"] = made["weight"].detach().clone().requires_grad_()
        scored(made, ours=ours)
        weights.append(made["weight"].grad)
    assert weights[0] is not None
    assert torch.equal(*weights)


def test_under_autocast_the_head_is_trls(made: dict[str, Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        stock, own = (scored(made, ours=ours) for ours in (False, True))
    assert torch.equal(stock[1], own[1])
    assert all(torch.equal(one, other) for one, other in zip(stock[0], own[0], strict=True) if one is not None)
