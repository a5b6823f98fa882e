"""Bounds on what comes with a model and is run: its chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MAX_TEMPLATE = 256 * 1024
"""Characters; the longest templates of well-known models have some ten thousand."""
RENDER_SECONDS = 10.0
"""For one conversation; a usual one takes a tenth of a millisecond."""
MAX_RENDERED = 1024 * 1024
"""Characters that a template may write of its own, beside sixteen times those of the conversation."""


class BoundError(Exception):
    """A template is larger, slower or writes more than any that is meant well."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what is inside after some seconds, in a main thread; elsewhere, where no alarm can be set, it does nothing.

    Raises:
        BoundError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise BoundError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def require_small_template(template: Any) -> None:
    """Looks at a chat template before it is rendered.

    Raises:
        BoundError: it is too long.
    """
    if isinstance(template, str) and len(template) > MAX_TEMPLATE:
        raise BoundError(f"it has {len(template):,} characters, at most {MAX_TEMPLATE:,} are read")


def require_small_rendering(rendered: Any, conversation: int) -> None:
    """Looks at what a template wrote: text, or token ids.

    Args:
        rendered: what `apply_chat_template` gave.
        conversation: how many characters it was given.

    Raises:
        BoundError: it is out of proportion.
    """
    ids = rendered.get("input_ids") if hasattr(rendered, "get") else rendered
    if ids is not None and len(ids) > MAX_RENDERED + 16 * conversation:
        raise BoundError(f"it makes {len(ids):,} characters or tokens of a conversation of {conversation:,} characters")
