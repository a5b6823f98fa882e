from __future__ import annotations

import hashlib
import math

import pytest
import torch

from pipeline.errors import ExitCode, PipelineError
from pipeline.training.proof import (
    Scores,
    check_drift,
    check_evaluation,
    check_movement,
    check_saved,
    check_start,
    evaluated_sample,
    fingerprints,
    reference_hash,
)
from pipeline.training.tolerance import Tolerance, tolerance_for

TOLERANCE = Tolerance(start=0.02, drift=0.0)
REFERENCE = torch.tensor([[-10.0, -12.0], [-9.0, -11.0]])


def scores(*, loss: float = math.log(2), **rewards: float) -> Scores:
    metrics = {f"rewards/{name}": rewards.get(name, 0.0) for name in ("chosen", "rejected", "margins")}
    return Scores(REFERENCE, REFERENCE, metrics, loss)


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


def test_float32_allows_no_drift_and_four_bits_compute_in_bfloat16() -> None:
    assert tolerance_for(torch.float32).drift == 0.0
    assert tolerance_for(torch.float32, "nf4") == tolerance_for(torch.bfloat16)


def test_the_hash_names_base_adapter_and_template() -> None:
    def named(base: str, weights: str, config: str, template: str) -> str:
        return reference_hash(base, {"sha256": weights, "config_sha256": config}, template)

    parts = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]
    assert named(*parts) == hashlib.sha256("\n".join([*parts, ""]).encode()).hexdigest()
    for at in range(4):
        assert named(*[part if i != at else "e" * 64 for i, part in enumerate(parts)]) != named(*parts)


def test_a_fingerprint_sees_one_bit() -> None:
    model = torch.nn.Linear(3, 2)
    before = fingerprints(model)
    assert fingerprints(model) == before
    with torch.no_grad():
        model.weight[1, 2] = torch.nextafter(model.weight[1, 2], torch.tensor(9.0))
    after = fingerprints(model)
    assert (after["weight"] != before["weight"], after["bias"] == before["bias"]) == (True, True)


def test_movement() -> None:
    before = {"base": 1, "lora_A": 2, "lora_B": 3}
    assert check_movement(before, {"base": 1, "lora_A": 5, "lora_B": 6}, {"lora_A", "lora_B"}) == []
    assert check_movement(before, {"base": 1, "lora_A": 5, "lora_B": 3}, {"lora_A", "lora_B"}) == ["lora_B"]
    with pytest.raises(PipelineError, match="frozen parameter moved: base") as caught:
        check_movement(before, {"base": 9, "lora_A": 5, "lora_B": 6}, {"lora_A", "lora_B"})
    assert caught.value.code == "frozen-moved"
    with pytest.raises(PipelineError) as caught:
        check_movement(before, before, {"lora_A", "lora_B"})
    assert caught.value.code == "nothing-moved"


def test_the_saved_folders_must_give_what_the_trainer_gave() -> None:
    policy = REFERENCE + torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    trained = Scores(REFERENCE, policy, {}, 0.0)
    found = check_saved(policy + 0.01, REFERENCE, trained, TOLERANCE, beta=0.1)
    assert found["policy"] == pytest.approx(0.01, abs=1e-5)
    assert found["margin"] == pytest.approx(0.0, abs=1e-6)  # chosen and rejected moved alike
    wrong = policy.clone()
    wrong[1, 0] += 0.03
    for other in (wrong, policy * float("nan")):
        with pytest.raises(PipelineError, match="not the trained policy") as caught:
            check_saved(other, REFERENCE, trained, TOLERANCE, beta=0.1)
        assert caught.value.code == "saved-differs"


def test_rewards_from_the_saved_folders_are_those_of_the_last_evaluation() -> None:
    """Beta 0.5; log-ratios of chosen 2, 4, 9 and of rejected 0, 2, -1 in batches of 2 and 1: means of 3 and 9, of 1 and
    -1, so rewards of 0.5 * 6 and 0.5 * 0, and a margin of 3."""
    policy = torch.tensor([[2.0, 0.0], [4.0, 2.0], [9.0, -1.0]])
    reference = torch.zeros(3, 2)
    evaluated = 0.5 * policy
    logged = {"eval_rewards/chosen": 3.0, "eval_rewards/rejected": 0.0, "eval_rewards/margins": 3.0}
    given = {"beta": 0.5, "batch_size": 2, "tolerance": TOLERANCE}
    assert check_evaluation(policy, reference, evaluated, logged, **given) == {"pairs": 3, "apart": 0.0}
    assert check_evaluation(policy + 0.01, reference, evaluated, logged, **given)["apart"] == pytest.approx(
        0.005, rel=1e-3
    )
    for name in logged:
        for wrong in (logged[name] + 0.05, float("nan")):
            with pytest.raises(PipelineError, match="its pairs give") as caught:
                check_evaluation(policy, reference, evaluated, {**logged, name: wrong}, **given)
            assert caught.value.code == "saved-differs"
    # Two pairs that are wrong by as much, so that the means are right.
    wrong_policy = policy + torch.tensor([[0.2, 0.0], [-0.2, 0.0], [0.0, 0.0]])
    for other in (wrong_policy, policy * float("nan")):
        with pytest.raises(PipelineError, match=r"held-out pair 0 \(chosen\)") as caught:
            check_evaluation(other, reference, evaluated, logged, **given)
        assert caught.value.code == "saved-differs"


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40, 1000])
def test_the_sample_is_spread_over_all_held_out_pairs(count: int) -> None:
    at = evaluated_sample(count)
    assert len(at) == min(count, 8)
    assert at[0] == 0
    assert count - 1 - at[-1] < count / 8
    assert at == sorted(set(at))
