"""What must not be shown or written: keys, tokens and passwords, wherever they got into a text.

They belong into environment variables, and nothing of ours reads them from elsewhere. But they come along: in what a
user types after `--set`, in an address, in what a service answers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_HIDDEN = "***"
_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD")
"""Environment variables that hold a secret, by their names."""
_SHORTEST = 8
"""A shorter value stands in many texts by chance."""
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_GIVEN = re.compile(
    r"(\b\w*(?:api_?key|(?:hub|hf|auth|access|api)_token|secret|passw(?:or)?d)\b[\"']?\s*[=:]\s*)[^\s,}&`]+",
    re.IGNORECASE,
)
_KEY_ENV = re.compile(r"(\bkey_env[\"']?\s*[=:]\s*)(?![\"']?[A-Z_][A-Z0-9_]*\b(?![-.\w]))[^\s,}&`]+")
"""A key in the place of the variable's name that holds it."""


def hide(text: str) -> str:
    """`text` with what looks like a secret replaced by `***`."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name.upper()) and value in text and not Path(value).exists():
            text = text.replace(value, _HIDDEN)
    for pattern in (_GIVEN, _KEY_ENV):
        text = pattern.sub(rf"\1{_HIDDEN}", text)
    return _LOGIN.sub(_HIDDEN, text)
