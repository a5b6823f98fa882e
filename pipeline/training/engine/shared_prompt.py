"""DPO's forward with the prompt encoded once, inside TRL's own trainer.

Two methods of the model are replaced. The backbone gets the joint row in place of TRL's batch and gives its hidden
states back in TRL's shape, so that TRL's fused head, its loss, its metrics and a mixture's auxiliary loss go on as
they are. Around the fused head, positions that both rows of a pair share are scored once and filled in for the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.training.engine.attention import NAME
from pipeline.training.engine.joint import Joint, join
from pipeline.training.engine.short import attend_with
from pipeline.training.engine.trial import rounding_of
from pipeline.training.engine.trunk import Trunk

_SUPPORTED = {"full_attention", "sliding_attention"}
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
_BATCH = {"input_ids", "attention_mask", "labels", "use_cache", "output_router_logits"}


class SharedPrompt:
    """The joint forward of a causal language model that has TRL's fused head; `on` says whether it is used.

    Args:
        model: the model, or the PEFT model around it.
        rounds: whether float32 products are rounded to fewer bits.
    """

    def __init__(self, model: Any, *, rounds: bool = False) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone = self.model.base_model
        self.on = False
        self._rounds = rounds
        self.layers = 0
        """How many attention layers read the last joint row."""
        self.trunk: Trunk | None = None
        """Kept output of frozen blocks, if it is used."""
        self._trial: tuple[torch.Tensor, torch.Tensor] | None = None
        """The last batch that was checked, and its log-probabilities on the plain path: a trunk is checked on the same
        one, before the first step."""
        self._score = self.model.forward
        self._encode = self.backbone.forward

    def refusal(self) -> str | None:
        """Why the model's structure rules the joint row out; None where it does not."""
        config = self.model.config.get_text_config()
        others = sorted(set(getattr(config, "layer_types", None) or ()) - _SUPPORTED)
        if others:
            return f"layers of type {', '.join(others)} carry a state along the row, which two completions cannot share"
        attention = config._attn_implementation
        if attention not in ("sdpa", NAME):
            return f"the attention implementation is `{attention}`, and a joint row needs `sdpa`"
        return None

    def install(self) -> None:
        """Puts the joint forward in, switched on."""
        attend_with(self.model, NAME)
        self.model.forward = _as(self._joint_score, self._score)
        self.backbone.forward = _as(self._joint_encode, self._encode)
        self.on = True

    def uninstall(self) -> None:
        """Puts the model's own methods back."""
        self.on = False
        self.backbone.forward = self._encode
        self.model.forward = self._score
        attend_with(self.model, "sdpa", (NAME,))

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open, the plain path is run."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def _joint_score(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """TRL's fused head on a joint row; any other call goes to the model as it is."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names every argument
        rows = kwargs["input_ids"].shape[0] if "input_ids" in kwargs else 1
        if not (self.on and fused_lm_head and not args and set(kwargs) <= _BATCH and rows % 2 == 0):
            return self._score(*args, fused_lm_head=fused_lm_head, **kwargs)
        # A loss on routers counts the last token of a row as well.
        keep_last = kwargs.get("output_router_logits") or getattr(self.model.config, "output_router_logits", False)
        joint = join(kwargs["input_ids"], kwargs["attention_mask"], keep_last=keep_last, apart=self.trunk is not None)
        labels = kwargs.pop("labels").clone()
        half = rows // 2
        labels[half:, 1:].masked_fill_(joint.repeated, -100)
        output = self._score(**kwargs, labels=labels, fused_lm_head=True, joint=joint)
        self.layers = joint.layers
        for name in _PER_TOKEN:
            values = getattr(output, name)
            if values is not None:
                chosen, rejected = values.split(half)
                setattr(output, name, torch.cat((chosen, torch.where(joint.repeated, chosen, rejected))))
        return output

    def _joint_encode(self, *args: Any, joint: Joint | None = None, **kwargs: Any) -> Any:
        """The backbone on a joint row; hidden states and routers in the shape of TRL's batch."""
        if joint is None:
            return self._encode(*args, **kwargs)
        rows, length = kwargs.pop("input_ids").shape
        # Four dimensions: passed on as it is, by models with one mask and with one for each type of layer.
        kwargs["attention_mask"] = joint.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)

        def encode(row: Joint) -> Any:
            return self._encode(*args, input_ids=row.input_ids, position_ids=row.position_ids, joint=row, **kwargs)

        if self.trunk is None:
            output = encode(joint)
        else:
            hidden = self.trunk.output(joint, encode)
            with self.trunk.skipped(hidden):
                output = encode(joint)
        hidden = output.last_hidden_state[0].index_select(0, joint.source)
        output.last_hidden_state = hidden.view(rows, length, -1)
        if getattr(output, "router_logits", None) is not None:
            output.router_logits = tuple(logits.index_select(0, joint.source) for logits in output.router_logits)
        return output

    def check(self, model: Any, batch: dict[str, torch.Tensor]) -> str | None:
        """Holds the joint forward against the plain one, on one batch and without gradients.

        Args:
            model: what the trainer calls: this model, or what it is wrapped in.
            batch: TRL's, on the model's device.

        Returns:
            Why the joint forward is not to be used; None where it computes the same.
        """
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        with torch.no_grad():
            if self._trial is None or not torch.equal(self._trial[0], batch["input_ids"]):
                with self.off():
                    plain = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
                self._trial = batch["input_ids"], plain
            plain = self._trial[1]
            try:
                joined = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
            except (TypeError, ValueError, RuntimeError) as error:
                return f"the model does not take a joint row: {' '.join(str(error).split())[:200]}"
        layers = self.model.config.get_text_config().num_hidden_layers
        if self.trunk is not None:
            layers -= len(self.trunk.blocks)
        if self.layers != layers:
            return f"{self.layers} of {layers} layers read the row through the attention that hides the completions"
        scored = (labels[:, 1:] != -100).sum(dim=1).clamp(min=1)
        apart = float(((plain - joined).abs().sum(dim=1) / scored).max())
        allowed = rounding_of(self.model.dtype, rounds=self._rounds)
        if not apart <= allowed:
            return f"its log-probabilities are {apart:.3g} nats a token off the plain path's (allowed: {allowed:g})"
        return None


def _as(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` under the signature of `stock`, which `generate` reads."""

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return forward
