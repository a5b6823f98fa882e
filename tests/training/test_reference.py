from __future__ import annotations

import hashlib
import math

import pytest
import torch

from pipeline.errors import ExitCode, PipelineError
from pipeline.training.reference import Scores, Tolerance, check_drift, check_start, reference_hash, tolerance_for

TOLERANCE = Tolerance(start=0.02, drift=0.0)
REFERENCE = torch.tensor([[-10.0, -12.0], [-9.0, -11.0]])


def scores(*, loss: float = math.log(2), **rewards: float) -> Scores:
    metrics = {f"rewards/{name}": rewards.get(name, 0.0) for name in ("chosen", "rejected", "margins")}
    return Scores(REFERENCE, metrics, loss)


def start(given: Scores, reopened: torch.Tensor = REFERENCE, *, plain_sigmoid: bool = True) -> None:
    check_start(given, reopened, TOLERANCE, beta=0.1, plain_sigmoid=plain_sigmoid)


def test_a_right_start() -> None:
    start(scores(loss=0.6931))
    start(scores(loss=0.25), plain_sigmoid=False)  # a loss that is not ln 2 at margin 0, such as ipo's


@pytest.mark.parametrize(
    ("given", "reopened", "words"),
    [
        (scores(), REFERENCE + torch.tensor([[0.0, 0.0], [0.0, 0.03]]), "not the SFT adapter: 0.03 nats"),
        (scores(), REFERENCE * float("nan"), "not the SFT adapter"),
        (scores(chosen=0.003, rejected=0.003), REFERENCE, "rewards/chosen reads 0.003"),
        (scores(rejected=-0.003), REFERENCE, "rewards/rejected reads -0.003"),
        (scores(margins=0.003), REFERENCE, "rewards/margins reads 0.003"),
        (scores(margins=float("nan")), REFERENCE, "rewards/margins reads nan"),
        (scores(loss=0.70), REFERENCE, "reads 0.700000 and not ln 2 = 0.693147"),
    ],
)
def test_a_wrong_start_says_what_is_off(given: Scores, reopened: torch.Tensor, words: str) -> None:
    with pytest.raises(PipelineError) as caught:
        start(given, reopened)
    assert words in caught.value.message
    assert (caught.value.code, caught.value.exit_code) == ("wrong-start", ExitCode.WRONG)


def test_drift() -> None:
    assert check_drift(REFERENCE, REFERENCE.clone(), TOLERANCE) == 0.0
    moved = REFERENCE.clone()
    moved[1, 0] += 2**-19
    with pytest.raises(PipelineError, match="reference moved") as caught:
        check_drift(REFERENCE, moved, TOLERANCE)
    assert caught.value.code == "reference-moved"
    assert check_drift(REFERENCE, moved, tolerance_for(torch.bfloat16)) == pytest.approx(2**-19)
    with pytest.raises(PipelineError):
        check_drift(REFERENCE, REFERENCE * float("nan"), tolerance_for(torch.bfloat16))


def test_float32_allows_no_drift() -> None:
    assert tolerance_for(torch.float32).drift == 0.0


def test_the_hash_names_base_adapter_and_template() -> None:
    parts = ["a" * 64, "b" * 64, "c" * 64]
    named = reference_hash(*parts)
    assert named == hashlib.sha256("\n".join([*parts, ""]).encode()).hexdigest()
    for at in range(3):
        assert reference_hash(*[part if i != at else "d" * 64 for i, part in enumerate(parts)]) != named
