"""The metrics of a comparison as a person reads them, on the terminal and in the report: names, order, digits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pipeline.evaluation.intervals import Estimate

_WORDS = {
    "json_conformance": "conforms to the schema",
    "ends_by_itself": "ends by itself",
    "preference_accuracy": "prefers chosen answers",
    "preference_margin": "reward margin",
    "perplexity": "perplexity",
    "length_mean": "answer length, tokens",
    "repetition": "repeats itself",
    "kl_to_reference": "KL to its reference, nats",
    "regression_perplexity": "general: perplexity",
    "regression_agreement": "general: agrees with base",
    "judge": "judgement",
    "lm_eval": "figures of lm-eval",
}
_PLAIN = ("preference_margin", "perplexity", "length_mean", "kl_to_reference", "regression_perplexity")
"""Metrics that are no shares."""


def metric_words(name: str) -> str:
    """A metric, or a check, of `compare.json` in words."""
    kind, _, rest = name.partition("/")
    if kind == "match":
        return f"{rest} correct"
    if kind == "check":
        return f"check {rest}"
    return _WORDS[name]


def in_order(names: Iterable[str]) -> list[str]:
    """Metrics in reading order: what the user asked for first, then the rest."""
    distinct = list(dict.fromkeys(names))
    order = ["json_conformance", *(name for name in distinct if "/" in name), *_WORDS]
    return sorted(distinct, key=order.index)


def is_share(name: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return name not in _PLAIN


def number_text(value: float, name: str, sign: str = "") -> str:
    """A metric's value, without its unit; `sign`: `+` for a difference."""
    if is_share(name):
        # The interval of fifty prompts spans tens of points: decimals would be noise.
        return f"{100 * value:{sign}.0f}"
    return f"{value:{sign}.1f}" if abs(value) >= 100 else f"{value:{sign}#.3g}"


def interval_text(estimate: Estimate, name: str, sign: str = "") -> str:
    """A metric's 95 % interval in brackets."""
    return f"[{number_text(estimate.low, name, sign)}, {number_text(estimate.high, name, sign)}]"


def last_said(text: Any, role: str | None = None) -> str:
    """A text as it is; of messages the content of the last one, or of the last one of a role."""
    if isinstance(text, str):
        return text
    said = [turn.get("content") for turn in text if role is None or turn.get("role") == role]
    if said and isinstance(said[-1], str):
        return said[-1]
    # A turn that only calls tools has no content, and some content is in parts.
    return json.dumps(text[-1], ensure_ascii=False) if text else ""
