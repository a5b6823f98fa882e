"""How much of an answer says again what it said before."""

from __future__ import annotations

_LENGTH = 4


def repetition(text: str) -> float:
    """The share of an answer's runs of four words that stood in it before; 0 for one of fewer words."""
    words = text.split()
    runs = [tuple(words[at : at + _LENGTH]) for at in range(len(words) - _LENGTH + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
