"""SFT batches without padding: the rows of a micro-batch behind each other in one sequence, none seeing another.

The batch itself is TRL's `padding_free` one: positions restart with each row, and the first token of a row is in no
loss, so no row is predicted from another. TRL offers it for FlashAttention alone; here every attention that
Transformers dispatches does it, by running once for each row on that row's part of queries, keys and values. No mask
is made, no memory grows with the square of the batch, and the sums are those of the row alone. What is not attention
(projections, norms, experts, the head) does not look at neighbours and runs on all rows at once.

A layer that hands a state from token to token would hand it from row to row: models with such layers keep padded
batches, and so does every model whose log-probabilities on a trial batch differ from those of the padded one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.training.engine.short import attend

SEGMENTS = "pipeline_rows"
"""The name under which `attend_by_row` is registered with Transformers."""
_LENGTHS = "row_lengths"
"""The keyword that carries the rows' lengths through the model to its attention layers."""
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
        **kwargs: what the layer hands to its attention, the rows' lengths among it.

    Returns:
        `[1, T, heads, d]`, and no weights.
    """
    lengths: list[int] = kwargs.pop(_LENGTHS)
    eager = kwargs.pop(_ITSELF) == "eager"
    assert attention_mask is None, "rows have lengths in place of a mask"
    window = kwargs.get("sliding_window")
    parts: Any = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    run: Callable[..., torch.Tensor] = _attend_eagerly if eager else _attend
    rows = [run(module, *part, length, window, **kwargs) for length, part in zip(lengths, parts, strict=True)]
    return torch.cat(rows, dim=1), None


def by_row(lengths: list[int], own: str) -> dict[str, Any]:
    """What a model's forward takes for attention by row, where its attention is `SEGMENTS`.

    Args:
        lengths: of the rows.
        own: the model's own attention, `sdpa` or `eager`.
    """
    return {_LENGTHS: lengths, _ITSELF: own}


def _attend(module: Any, query: Any, key: Any, value: Any, length: int, window: int | None, /, **kwargs: Any) -> Any:
    """One row by SDPA, which knows causality by itself."""
    mask = None if window is None or length <= window else _allowed(length, window, query.device)
    return attend(module, query, key, value, mask, **kwargs)


def _attend_eagerly(
    module: Any, query: Any, key: Any, value: Any, length: int, window: int | None, /, **kwargs: Any
) -> Any:
    """One row by the model's own eager attention, which takes everything from the mask."""
    allowed = _allowed(length, window or length, query.device)
    mask = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return _eager_of(module)(module, query, key, value, mask, **kwargs)[0]


@lru_cache(maxsize=16)
def _allowed(length: int, window: int, device: torch.device) -> torch.Tensor:
    """`[1, 1, length, length]`: whether a query sees a key, itself and the `window - 1` before it."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


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


@contextmanager
def own_masks() -> Iterator[None]:
    """While open, no mask is taken from before, and none that is made stays: those of a trace have no storage."""
    _allowed.cache_clear()
    try:
        yield
    finally:
        _allowed.cache_clear()


def _dispatch_rows(backbone: Any) -> Callable[[], None]:
    """Lets each forward of `backbone` choose its attention by its batch: by row where rows are given, else its own.

    The choice outlives the forward, since checkpointed blocks are computed again in the backward pass.

    Returns:
        What takes this back.
    """
    # A block that PEFT copied for an adapter has a configuration of its own.
    found = [module.config for module in backbone.modules() if hasattr(module, "config")]
    configs = list({id(config): config for config in found}.values())
    own = backbone.config._attn_implementation

    def use(implementation: str) -> None:
        for config in configs:
            config._attn_implementation = implementation

    def choose(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boundaries = kwargs.pop("cu_seq_lens_q", None)
        if boundaries is not None:
            for key in ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
                kwargs.pop(key, None)
            kwargs |= by_row(boundaries.diff().tolist(), own)
        use(own if boundaries is None else SEGMENTS)
        return args, kwargs

    handle = backbone.register_forward_pre_hook(choose, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        use(own)

    return undo


def _largest_difference(trainer: Any, collator: DataCollatorForLanguageModeling) -> float:
    """How far log-probabilities lie apart, in nats of a token, between the two forms of one batch.

    The batch has the longest row, which overruns a sliding window if any does, between the first ones.
    """
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    chosen = [at for at in range(min(_TRIAL_ROWS, len(lengths))) if at != longest]
    chosen.insert(1, longest)
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
