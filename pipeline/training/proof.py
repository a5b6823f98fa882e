"""The proof that a DPO run is what it says: the reference held still, what should train did, what was saved is that.

The check at step 0 alone proves nothing: with blocks shared between policy and reference it reads ln 2 as well, and
the reference then moves with the policy. So the reference is scored three times: reopened from the disk before
training, inside the trainer before the first step, and inside the trainer after the last. At the end the frozen
parameters must be those of the start, the trained ones others, and the two saved folders, reopened by stock PEFT on a
fresh base, must give the log-probabilities and rewards that the trainer gave.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.tokens import Pair
from pipeline.errors import ExitCode, PipelineError
from pipeline.runs.files import write_json
from pipeline.training.engine.reference import COLUMNS
from pipeline.training.engine.trainer import outputs_of
from pipeline.training.tolerance import Tolerance

PROOF = "proof.json"
PROOF_PAIRS = 8
"""How many of the first training pairs are scored."""
EVALUATED_PAIRS = 8
"""How many held-out pairs are scored again at the end."""

_SIGMOID_AT_ZERO = math.log(2)


def reference_hash(base_sha256: str, adapter: Mapping[str, str | None], template_sha256: str | None) -> str:
    """Names the reference: base weights, SFT adapter and chat template together decide every log-probability.

    Args:
        base_sha256: of the base's weights.
        adapter: `hashes_of` the SFT adapter: its weights and what its configuration makes of them.
        template_sha256: of the chat template.
    """
    parts = (base_sha256, adapter["sha256"], adapter["config_sha256"], template_sha256)
    return hashlib.sha256("".join(f"{part}\n" for part in parts).encode()).hexdigest()


@dataclass(frozen=True)
class Scores:
    """What a DPOTrainer makes of the proof's pairs."""

    reference: torch.Tensor
    """Log-probabilities under the reference, `[N, 2]` float32 nats: chosen, rejected."""
    policy: torch.Tensor
    """The same under the policy."""
    metrics: dict[str, float]
    """The trainer's own metrics (`rewards/chosen`, `rewards/margins`, …), mean over batches."""
    loss: float
    """The trainer's own loss, mean over batches."""


def score(trainer: Any, batches: Sequence[dict[str, torch.Tensor]]) -> Scores:
    """The reference of a DPOTrainer on `batches`, and the trainer's loss and metrics there, without gradients.

    Args:
        trainer: a TRL DPOTrainer.
        batches: what its collator made.
    """
    was_training, ld_alpha, precomputed = trainer.model.training, trainer.ld_alpha, trainer.precompute_ref_logps
    trainer.model.eval()
    # LD-DPO weighs the tokens of a log-probability; the proof is about the plain sums.
    trainer.ld_alpha = None
    # The reference in memory is the one to prove, not what was kept of it: it is scored here.
    trainer.precompute_ref_logps = True
    references, policies, losses = [], [], []
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = trainer._prepare_inputs(dict(batch))
                reference = trainer.compute_ref_log_probs(trainer.model, inputs)
                references.append(torch.stack(reference, dim=1))
                # As TRL's precomputed columns, so that its loss is of these very numbers.
                inputs |= dict(zip(COLUMNS, reference, strict=True))
                with trainer.accelerator.autocast(), outputs_of(trainer.model) as outputs:
                    losses.append(float(trainer.compute_loss(trainer.model, inputs)))
                policies.append(torch.stack(outputs[0].log_probs.sum(dim=1).chunk(2), dim=1))
        logged = trainer._metrics["eval"]
        metrics = {key: sum(values) / len(values) for key, values in logged.items()}
    finally:
        # The trainer would log these with its next evaluation, and these batches are not part of any.
        trainer._metrics["eval"].clear()
        trainer.ld_alpha, trainer.precompute_ref_logps = ld_alpha, precomputed
        trainer.model.train(was_training)
    return Scores(
        torch.cat(references).float().cpu(), torch.cat(policies).float().cpu(), metrics, sum(losses) / len(losses)
    )


def fingerprints(model: torch.nn.Module) -> dict[str, int]:
    """A number for every parameter that changes with any bit of it, computed where the parameter lives.

    `torch.hash_tensor` is the exclusive or of all elements: it cannot see two elements that change places, which no
    optimizer step does.
    """
    with torch.no_grad():
        return {
            name: int(torch.hash_tensor(parameter.detach()).view(torch.int64))
            for name, parameter in model.named_parameters()
        }


def check_movement(before: dict[str, int], after: dict[str, int], trained: set[str]) -> list[str]:
    """What was frozen is as it was, and what trains is not.

    Args:
        before: `fingerprints` of the model at the start.
        after: the same at the end.
        trained: names of the trainable parameters.

    Returns:
        Trainable parameters that did not move: an expert that no token was routed to is one, and it is no error.

    Raises:
        PipelineError: a frozen parameter moved, or nothing that should train did.
    """
    moved = {name for name, number in after.items() if before[name] != number}
    if moved - trained:
        name = sorted(moved - trained)[0]
        raise _broken(
            f"a frozen parameter moved: {name} ({len(moved - trained)} in all)",
            "weights are opened by `unfreeze` alone; check `options` for an optimizer that trains more",
            code="frozen-moved",
        )
    still = sorted(trained - moved)
    if len(still) == len(trained):
        raise _broken(
            "no parameter moved: the run trained nothing",
            "raise the learning rate, or train more than the steps of the warm-up",
            code="nothing-moved",
        )
    return still


def check_saved(
    policy: torch.Tensor, reference: torch.Tensor, trained: Scores, tolerance: Tolerance, beta: float
) -> dict[str, float]:
    """The two saved folders, reopened by stock PEFT, give what the trainer gave.

    Args:
        policy: `[N, 2]` nats of the saved DPO adapter on a fresh base, on the proof's pairs.
        reference: the same of the SFT adapter.
        trained: the trainer's scores after the last step.
        tolerance: by precision.
        beta: DPO's beta, which makes rewards of log-ratios (Rafailov et al. 2023, equation 7).

    Returns:
        The largest differences: `policy` in nats, `margin` in rewards.

    Raises:
        PipelineError: they differ: what was saved is not what was trained.
    """
    apart = float((policy - trained.policy).abs().max())
    chosen_logratios, rejected_logratios = (policy - reference).unbind(dim=1)
    trained_chosen, trained_rejected = (trained.policy - trained.reference).unbind(dim=1)
    margins = beta * (chosen_logratios - rejected_logratios)
    margins_apart = float((margins - beta * (trained_chosen - trained_rejected)).abs().max())
    if not (apart <= tolerance.start and margins_apart <= 4 * beta * tolerance.start):
        raise _broken(
            f"the saved adapter is not the trained policy: {apart:.4g} nats apart, margins {margins_apart:.4g}",
            "something that was trained was not saved; open weights by `unfreeze` only",
            code="saved-differs",
        )
    return {"policy": apart, "margin": margins_apart}


def evaluated_sample(count: int) -> list[int]:
    """Which held-out pairs are scored again at the end, evenly spread."""
    return sorted({at * count // EVALUATED_PAIRS for at in range(EVALUATED_PAIRS)})


def check_evaluation(
    policy: torch.Tensor,
    reference: torch.Tensor,
    evaluated: torch.Tensor,
    logged: Mapping[str, float],
    *,
    beta: float,
    batch_size: int,
    tolerance: Tolerance,
) -> dict[str, float]:
    """Rewards of held-out pairs, recomputed from the two saved folders, are those of the evaluation logged last.

    Pair by pair for the sample; and the pairs of that evaluation have the means that were logged.

    Args:
        policy: `[n, 2]` nats of the saved DPO adapter on a fresh base, on the pairs of `evaluated_sample`.
        reference: the same of the SFT adapter.
        evaluated: `[N, 2]` rewards of all held-out pairs, as TRL's loss had them.
        logged: the last evaluation, with TRL's `eval_rewards/…`: each a mean over batches of a mean over pairs.
        beta: DPO's beta.
        batch_size: of the evaluation.
        tolerance: by precision.

    Returns:
        How many `pairs` were scored again, and the largest difference of a reward, `apart`.

    Raises:
        PipelineError: what was logged is not what was saved.
    """
    allowed = 2 * beta * tolerance.start
    chosen, rejected = evaluated.unbind(dim=1)
    for name, values in (("chosen", chosen), ("rejected", rejected), ("margins", chosen - rejected)):
        found = float(torch.stack([batch.mean() for batch in torch.split(values, batch_size)]).mean())
        _hold(f"rewards/{name}", logged[f"eval_rewards/{name}"], f"its pairs give {found:.4g}", found, allowed)
    at = evaluated_sample(len(evaluated))
    rewards = beta * (policy - reference)  # Rafailov et al. 2023, equation 7 without its partition term
    for pair, saved, then in zip(at, rewards.tolist(), evaluated[at].tolist(), strict=True):
        for side, one, other in zip(("chosen", "rejected"), then, saved, strict=True):
            _hold(f"a reward of held-out pair {pair} ({side}) as", one, f"the folders give {other:.4g}", other, allowed)
    return {"pairs": len(at), "apart": float((rewards - evaluated[at]).abs().max())}


def _hold(what: str, logged: float, given: str, found: float, allowed: float) -> None:
    if not abs(found - logged) <= allowed:
        raise _broken(
            f"the last evaluation logged {what} {logged:.4g}, and {given}",
            "what was saved is not what was evaluated; check `dpo.options`",
            code="saved-differs",
        )


def check_start(
    scores: Scores, reopened: torch.Tensor, tolerance: Tolerance, *, beta: float, plain_sigmoid: bool
) -> None:
    """Step 0: the reference is the SFT adapter, the policy equals it, the margin is 0, the loss ln 2.

    A margin or reward may be off by `beta` times the tolerance, a loss (slope 1/2 at margin 0) by no more.

    Args:
        scores: of the trainer before its first step.
        reopened: `[N, 2]` nats of the SFT adapter, opened from the disk apart from the trainer, on the same pairs.
        tolerance: by precision.
        beta: DPO's beta.
        plain_sigmoid: whether the loss is the plain sigmoid one, which reads ln 2 at margin 0.

    Raises:
        PipelineError: says which of these is off, and by how much.
    """
    apart = float((scores.reference - reopened).abs().max())
    if not apart <= tolerance.start:
        raise _broken(
            f"the reference in the trainer is not the SFT adapter: {apart:.4g} nats apart on a completion",
            "the base or the adapter on the disk is not what the SFT run trained; train SFT again, or name it with "
            "--from",
        )
    allowed = beta * tolerance.start
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        value = scores.metrics[name]
        if not abs(value) <= allowed:
            raise _broken(
                f"the policy does not start at the reference: {name} reads {value:.4g} at step 0 and not 0",
                "another adapter or dropout is active in one of them; check `dpo.options`",
            )
    if plain_sigmoid and not abs(scores.loss - _SIGMOID_AT_ZERO) <= allowed:
        raise _broken(
            f"the loss at step 0 reads {scores.loss:.6f} and not ln 2 = {_SIGMOID_AT_ZERO:.6f}",
            "check `dpo.options` for what changes the loss",
        )


def check_drift(before: torch.Tensor, after: torch.Tensor, tolerance: Tolerance) -> float:
    """The largest difference, in nats, between the reference before and after training.

    Raises:
        PipelineError: it is more than the tolerance: the reference moved, and every logged margin is wrong.
    """
    drift = float((after - before).abs().max())
    if not drift <= tolerance.drift:
        raise _broken(
            f"reference moved: {drift:.4g} nats between the first step and the last, so every logged margin is wrong",
            "trained weights are shared with the reference; open weights by `dpo.unfreeze` only",
            code="reference-moved",
        )
    return drift


def write_proof(folder: Path, pairs: Sequence[Pair], policy: torch.Tensor, reference: torch.Tensor) -> None:
    """Keeps the pairs and what the saved folders made of them, so that `pipeline verify` can repeat the proof.

    Args:
        folder: the run's.
        pairs: N tokenised pairs.
        policy: `[N, 2]` nats under the saved DPO adapter: chosen, rejected.
        reference: the same under the SFT adapter.
    """
    rows = zip(pairs, policy.tolist(), reference.tolist(), strict=True)
    kept = [{**pair._asdict(), "policy": ours, "reference": theirs} for pair, ours, theirs in rows]
    write_json(folder / PROOF, {"pairs": kept})


def _broken(message: str, mend: str, code: str = "wrong-start") -> PipelineError:
    return PipelineError(message, code=code, pointer="/dpo", mend=mend, exit_code=ExitCode.WRONG)
