from __future__ import annotations

from contextlib import suppress
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
    before = trl_utils._use_triton, chunked_logprob.TOKEN_CHUNK_SIZE
    with compact_head(torch.device("cuda")):
        assert trl_utils._use_triton(torch.device("cpu"))
        assert before[1] == chunked_logprob.TOKEN_CHUNK_SIZE
    assert (trl_utils._use_triton, chunked_logprob.TOKEN_CHUNK_SIZE) == before
    with suppress(KeyError), compact_head(torch.device("cpu")):
        assert chunked_logprob.TOKEN_CHUNK_SIZE == head._CPU_TOKENS
        raise KeyError
    assert (trl_utils._use_triton, chunked_logprob.TOKEN_CHUNK_SIZE) == before
