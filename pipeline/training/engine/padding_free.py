"""SFT batches without padding: the rows of a micro-batch behind each other in one sequence, none seeing another.

The batch itself is TRL's `padding_free` one: positions restart with each row, and the first token of a row is in no
loss, so no row is predicted from another. TRL offers it for FlashAttention alone; here every attention that
Transformers dispatches does it, by running once for each row on that row's part of queries, keys and values. No mask
is made, no memory grows with the square of the batch, and the sums are those of the row alone. What is not attention
(projections, norms, experts, the head) does not look at neighbours and runs on all rows at once.

What all rows of a micro-batch begin with, a system prompt or a template's first lines, is computed once, in front of
them, and every row sees it; its hidden states are then given to every row, so that a loss on it counts as often as in
TRL. Not where a dropout is on: TRL draws one for each row.

A layer that hands a state from token to token would hand it from row to row: models with such layers keep padded
batches, and so does every model whose log-probabilities on a trial batch differ from those of the padded one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.data.tokens import common_prefix
from pipeline.training.engine import short
from pipeline.training.engine.attention import attend_in_parts, part_by_part
from pipeline.training.engine.parts import Part, Row
from pipeline.training.engine.trial import trial_rows, window_of

SEGMENTS = "pipeline_rows"
"""The name under which `attend_by_row` is registered with Transformers."""
_ROW = "row_parts"
"""The keyword that carries the rows, as the parts of one, through the model to its attention layers."""
_WORTH = 8
"""Tokens that all rows have to begin with before they get a part of their own: each part is a call of attention."""
_ITSELF = "row_attention"
"""The keyword that carries the attention that is run on each row."""
_VARLEN = ("flash", "flex")
"""Attention that reads the rows' boundaries from the batch by itself."""
_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types whose tokens meet in attention alone."""
_TRIAL_ROWS = 4


def attend_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a batch without padding.

    Args:
        module: the attention layer.
        query: `[1, heads, T, d]`, T the tokens of all rows.
        key: `[1, key heads, T, d]`.
        value: the same.
        attention_mask: none is made for this attention.
        **kwargs: what the layer hands to its attention, the rows among it.

    Returns:
        `[1, T, heads, d]`, and no weights.
    """
    row: Row = kwargs.pop(_ROW)
    eager = kwargs.pop(_ITSELF) == "eager"
    assert attention_mask is None, "rows have lengths in place of a mask"
    if not eager:
        return attend_in_parts(module, query, key, value, row, **kwargs), None

    def run(part: Part, *given: torch.Tensor) -> torch.Tensor:
        """The model's own eager attention, which takes everything from the mask."""
        seen = row.mask(part, kwargs.get("sliding_window"), query.device)
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
        output: torch.Tensor = _eager_of(module)(module, *given, mask, **kwargs)[0]
        return output

    return part_by_part(query, key, value, row, run), None


def by_row(lengths: list[int], own: str, front: int = 0) -> dict[str, Any]:
    """What a model's forward takes for attention by row, where its attention is `SEGMENTS`.

    Args:
        lengths: of the rows, behind what stands in front of them.
        own: the model's own attention, `sdpa` or `eager`.
        front: tokens that stand in front of all rows.
    """
    stops = list(accumulate(lengths, initial=front))
    before = ((0, front),) if front else ()
    rows = [Part(start, stop, before) for start, stop in pairwise(stops)]
    return {_ROW: Row([Part(0, front), *rows]), _ITSELF: own}


def _eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    """The eager attention beside a layer in its modelling file, which is Transformers' own convention."""
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def padding_free_collator(pad_token_id: int) -> DataCollatorForLanguageModeling:
    """TRL's collator of batches without padding."""
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)


def leave_padding_out(trainer: Any, *, rounds: bool = False) -> str | None:
    """Switches a TRL SFTTrainer to batches without padding, if its model computes the same on them.

    The rows of each optimizer step stay the same, and so do loss and gradients, but for the order of sums.

    Args:
        trainer: one that has not begun to train.
        rounds: whether float32 products are rounded to fewer bits.

    Returns:
        Why padding stays; None where it is gone.
    """
    reason = obstacle(_base_model(trainer), trainer.args)
    if reason is None and len(trainer.train_dataset) < 2:
        reason = "there is but one row"
    if reason is not None:
        return reason
    model = _base_model(trainer)
    undo = None
    if not model.config._attn_implementation.startswith(_VARLEN):
        undo = _dispatch_rows(model.base_model)
    collator = padding_free_collator(trainer.data_collator.pad_token_id)
    try:
        apart = _largest_difference(trainer, collator)
    except Exception as error:  # whatever a model's code raises on a form that it was not written for
        reason = f"a trial batch without padding fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 and not rounds else 0.5
        if not apart <= tolerance:
            reason = f"a trial batch without padding reads {apart:.2g} nats apart from the padded one"
    if reason is None:
        trainer.data_collator = collator
    elif undo is not None:
        undo()
    return reason


def _base_model(trainer: Any) -> Any:
    return trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model


def obstacle(model: Any, args: Any) -> str | None:
    """Why a model or its settings need padding, as far as can be told without running it.

    Args:
        model: the causal language model itself.
        args: TRL's configuration.
    """
    config = model.config
    implementation = config._attn_implementation
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if config.get_text_config() is not config:
        return "the model takes more than text"
    if other or getattr(model, "_is_stateful", False):
        return f"its layers hand a state from token to token ({', '.join(other) or config.model_type})"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not let its attention be chosen"
    if not (implementation in ("sdpa", "eager") or implementation.startswith(_VARLEN)):
        return f"`attn_implementation: {implementation}` is not known to keep rows apart"
    if args.neftune_noise_alpha:
        return "`neftune_noise_alpha` scales its noise by the padded length"
    if args.pad_to_multiple_of:
        return "`pad_to_multiple_of` asks for it"
    return None


@dataclass(frozen=True)
class _Layout:
    """Rows behind what they all begin with."""

    front: int
    kept: torch.Tensor
    """`[t]`: which tokens of the batch are computed."""
    source: torch.Tensor
    """`[T]`: where each token of the batch is among them."""


def _lay_out(ids: torch.Tensor, lengths: list[int]) -> _Layout | None:
    """Puts what all rows of `ids`, `[1, T]`, begin with in front of them; None where that is too little."""
    if len(lengths) < 2:
        return None
    rows = [part.tolist() for part in torch.split(ids[0], lengths)]
    front = min(common_prefix(min(rows), max(rows)), min(lengths) - 1)
    if front < _WORTH:
        return None
    at = torch.split(torch.arange(ids.shape[1]), lengths)
    kept = torch.cat([at[0][:front], *(row[front:] for row in at)])
    source = torch.empty(ids.shape[1], dtype=torch.long)
    source[kept] = torch.arange(len(kept))
    for row in at[1:]:
        source[row[:front]] = torch.arange(front)
    return _Layout(front, kept.to(ids.device), source.to(ids.device))


def _dispatch_rows(backbone: Any) -> Callable[[], None]:
    """Lets each forward of `backbone` choose its attention by its batch: by row where rows are given, else its own.

    Answers, which keep keys and values, are short rows.

    The choice outlives the forward, since checkpointed blocks are computed again in the backward pass.

    Returns:
        What takes this back.
    """
    # A block that PEFT copied for an adapter has a configuration of its own.
    found = [module.config for module in backbone.modules() if hasattr(module, "config")]
    configs = list({id(config): config for config in found}.values())
    own = backbone.config._attn_implementation
    draws = bool(getattr(backbone.config, "attention_dropout", 0)) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in backbone.modules()
    )
    layouts: list[_Layout | None] = [None]

    def use(implementation: str) -> None:
        for config in configs:
            config._attn_implementation = implementation

    def choose(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boundaries = kwargs.pop("cu_seq_lens_q", None)
        layouts[0] = None
        if boundaries is not None:
            for key in ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
                kwargs.pop(key, None)
            lengths, front = boundaries.diff().tolist(), 0
            if kwargs.get("input_ids") is not None and not (draws and module.training):
                layouts[0] = layout = _lay_out(kwargs["input_ids"], lengths)
                if layout is not None:
                    front = layout.front
                    lengths = [length - front for length in lengths]
                    kwargs |= {
                        name: kwargs[name].index_select(1, layout.kept) for name in ("input_ids", "position_ids")
                    }
            kwargs |= by_row(lengths, own, front)
        answers = short.NAME if own == "sdpa" and kwargs.get("use_cache") else own
        use(answers if boundaries is None else SEGMENTS)
        return args, kwargs

    def give_back(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layout = layouts[0]
        if layout is not None:
            output.last_hidden_state = output.last_hidden_state.index_select(1, layout.source)
            if getattr(output, "router_logits", None) is not None:
                output.router_logits = tuple(logits.index_select(0, layout.source) for logits in output.router_logits)

    handles = [
        backbone.register_forward_pre_hook(choose, with_kwargs=True),
        backbone.register_forward_hook(give_back),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        use(own)

    return undo


def _largest_difference(trainer: Any, collator: DataCollatorForLanguageModeling) -> float:
    """How far log-probabilities lie apart, in nats of a token, between the two forms of one batch."""
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    chosen = trial_rows(lengths, _TRIAL_ROWS, window_of(_base_model(trainer).config))
    rows = [trainer.train_dataset[at] for at in chosen]
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        padded, packed = (_logps(trainer, collate(rows)) for collate in (trainer.data_collator, collator))
    finally:
        trainer.model.train(was_training)
    return float((padded - packed).abs().max())


def _logps(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of the labels of a batch, row by row, `[labels]` nats."""
    inputs = trainer._prepare_inputs(batch)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        output = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
    logps: torch.Tensor = output.log_probs[output.label_mask]
    return logps.float()


AttentionInterface.register(SEGMENTS, attend_by_row)
