"""The memory of a stage, in bytes, by what it is for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from pipeline.model.device import Placement
from pipeline.model.scope import REFERENCE
from pipeline.plan.outline import Outline
from pipeline.plan.trace import Batch, trace_step
from pipeline.training.engine.padding_free import obstacle
from pipeline.training.engine.shared_prompt import SharedPrompt

_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of an NF4 weight: half a byte, a block's 8-bit scale for every 64, a float32 one for every 256 scales
(QLoRA, Dettmers et al. 2023, section 3: double quantisation)."""
_EIGHT_BIT_FROM = 4096
"""bitsandbytes keeps the moments of smaller tensors in 32 bits."""
_SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")
_DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's trainers ask of their head for each position (`add_fused_lm_head`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, at the worst moment of a step, without padding and each prompt once, if the engine does so.

    A trial batch decides in training whether it does; where that fails, TRL's padded batches take more than this.
    """

    weights: int
    """The base, with the frozen originals of what is opened."""
    adapter_and_opened: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    reference: int
    """DPO's copy of the adapter and of what is opened."""
    logits: int | None
    """The head: tiles of logits, and the states and gradients of the positions in the loss."""
    activations: int | None
    """What the forward pass keeps, and what the backward pass needs on top where that is more than the head does."""
    why_unknown: str | None = None
    """Why the last two are not known."""
    without_padding: bool = False
    """Whether the batch was counted so."""

    @property
    def total(self) -> int | None:
        """All of it; None where a part is not known."""
        parts = self.parts()
        return None if None in parts.values() else sum(part or 0 for part in parts.values())

    def parts(self) -> dict[str, int | None]:
        """Bytes by part."""
        parts = asdict(self)
        del parts["why_unknown"], parts["without_padding"]
        return parts

    @property
    def checkpoint(self) -> int:
        """Bytes on the disk of a checkpoint to resume from: the policy and the optimizer's moments."""
        return self.adapter_and_opened + self.optimizer


def memory_of(made: Outline, batch: Batch, args: Any, placement: Placement, *, dpo: bool) -> Memory:
    """The memory that a stage takes; the outline is used up.

    Args:
        made: the stage's policy.
        batch: its largest batch, which is padded where the engine cannot do without.
        args: TRL's configuration of the stage.
        placement: device and precision.
        dpo: whether the stage is DPO.
    """
    weights = trained = reference = optimizer = 0
    for name, parameter in made.policy.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if f".{REFERENCE}." in name:
            reference += size
        elif parameter.requires_grad:
            trained += size
            optimizer += _moments(parameter, args.optim.value)
        else:
            weights += int(parameter.numel() * _FOUR_BITS) if id(parameter) in made.quantized else size
    weights += sum(buffer.numel() * buffer.element_size() for buffer in made.policy.buffers())
    logits: int | None = None
    activations: int | None = None
    why = None
    if getattr(args, "disable_dropout", False):
        from trl.trainer.utils import disable_dropout_in_model

        disable_dropout_in_model(made.policy)
    without_padding = bool(batch.rows) and _pads(made.policy, args, dpo=dpo) is None
    for shape in (batch, batch.padded()) if without_padding else (batch.padded(),):
        try:
            step = trace_step(
                made.policy,
                shape,
                autocast=placement.dtype if placement.mixed else None,
                checkpointing=(args.activation_checkpointing_kwargs or {}) if args.activation_checkpointing else None,
                outputs=_DPO_OUTPUTS if dpo else _SFT_OUTPUTS,
                triton=placement.device.type == "cuda",
            )
        except Exception as error:  # whatever a model's code or PyTorch raises where values decide what is computed
            name = type(made.policy.get_base_model()).__name__
            why = f"a step of {name} cannot be followed without values: {' '.join(str(error).split())[:200]}"
            continue
        why, without_padding = None, bool(shape.rows)
        logits = step.head
        # At the head and in the blocks' backward pass are two moments: the sum of both parts is the worse one.
        activations = max(step.saved, step.peak - step.head)
        break
    return Memory(weights, trained, trained, optimizer, reference, logits, activations, why, without_padding)


def _pads(policy: Any, args: Any, *, dpo: bool) -> str | None:
    """Why the engine would leave batches as TRL makes them, as far as the model alone tells; None: nothing."""
    if dpo:
        return SharedPrompt(policy).refusal()
    return obstacle(policy.get_base_model(), args)


def _moments(parameter: nn.Parameter, optim: str) -> int:
    """Bytes of AdamW's two moments, which have the weight's dtype; in 8 bits with a float32 scale for every 256."""
    if "8bit" in optim and parameter.numel() >= _EIGHT_BIT_FROM:
        return 2 * parameter.numel() + 8 * parameter.numel() // 256
    return 2 * parameter.numel() * (4 if "8bit" in optim else parameter.element_size())
