"""An optional judge over any endpoint that speaks OpenAI's chat completions: which of two answers is better.

Each pair is asked in both orders, since judges favour the answer that they read first: a version wins a prompt only
where both orders say so, and everything else that was answered is a tie (Zheng et al. 2023, section 3.4). Answers are
kept in the user's cache by everything that they depend on, so that asking again costs nothing. The key comes from an
environment variable, goes into the request's header, and is written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.evaluation.intervals import Estimate, mean, proportion
from pipeline.experiment import Judge
from pipeline.runs.files import write_json

_TIMEOUT = 60.0
"""Seconds for one request."""
_ATTEMPTS = 5
_LONGEST_WAIT = 60.0
"""Seconds between two attempts, whatever the endpoint asks for."""
_HOPELESS = 3
"""So many prompts in a row without an answer end the judging: the endpoint is down."""
_ASK = """{instruction}

[Question]
{question}
[End of question]

[Answer A]
{a}
[End of answer A]

[Answer B]
{b}
[End of answer B]

Which answer is better? Reply with one letter and nothing else: A, B, or C if they are equally good."""


@dataclass(frozen=True)
class Judged:
    """What the judge made of one version against another, over all prompts."""

    wins: int
    losses: int
    ties: int
    failed: int
    """Prompts that the judge gave no usable answer to; they count for nothing."""
    win_rate: Estimate | None
    """Of the judged prompts, a tie as half a win; None where none was judged."""
    decisive: Estimate | None
    """The share of wins among wins and losses."""

    def as_dict(self) -> dict[str, Any]:
        """As `compare.json` holds it."""
        counts = {"wins": self.wins, "losses": self.losses, "ties": self.ties, "failed": self.failed}
        estimates = {"win_rate": self.win_rate, "decisive": self.decisive}
        return {**counts, **{name: one.as_dict() if one is not None else None for name, one in estimates.items()}}


def key_of(settings: Judge) -> str:
    """The judge's key.

    Raises:
        PipelineError: its environment variable is not set.
    """
    key = os.environ.get(settings.key_env)
    if not key:
        raise PipelineError(
            f"the judge needs a key, and the environment variable {settings.key_env} is not set",
            code="no-judge-key",
            pointer="/evaluation/judge/key_env",
            mend=f"export {settings.key_env}=…, or name another variable; `--no-judge` compares without it",
        )
    return key


def judge_pairs(
    settings: Judge,
    questions: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    cache: Path,
    seed: int,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[int], None] | None = None,
) -> Judged:
    """Puts every pair of answers to the judge, in both orders.

    Equal answers are a tie without being asked about. A request that fails is tried again, after as long as the
    endpoint asks for where it says so; what goes on failing is counted and left out.

    Args:
        settings: the experiment's `evaluation.judge`.
        questions: what was asked, as text.
        ours: the answers of the version that is judged.
        theirs: those of the one that it is judged against.
        cache: a folder for the judge's answers.
        seed: of the bootstrap interval.
        sleep: waits some seconds.
        progress: called with the number of prompts judged since the last call.

    Raises:
        PipelineError: there is no key, or the endpoint refuses it, knows no such model, or answers nothing at all.
    """
    client = _Client(settings, cache, sleep)
    outcomes: list[float] = []
    failed = in_a_row = 0
    for question, one, other in zip(questions, ours, theirs, strict=True):
        outcome = 0.5 if one == other else _outcome(client, settings, question, one, other)
        if outcome is None:
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row >= _HOPELESS and not outcomes:
                raise _unusable(f"it gave no usable answer to {in_a_row} prompts in a row: {client.trouble}")
        else:
            in_a_row = 0
            outcomes.append(outcome)
        if progress is not None:
            progress(1)
    wins, losses = outcomes.count(1.0), outcomes.count(0.0)
    decided = [outcome == 1.0 for outcome in outcomes if outcome != 0.5]
    return Judged(
        wins,
        losses,
        outcomes.count(0.5),
        failed,
        mean(outcomes, seed=seed) if outcomes else None,
        proportion(decided) if decided else None,
    )


def _outcome(client: _Client, settings: Judge, question: str, ours: str, theirs: str) -> float | None:
    """1 for a win, 0 for a loss, 0.5 for a tie; None where the judge gave no usable answer in one of the orders."""
    first = client.choice(_ASK.format(instruction=settings.instruction, question=question, a=ours, b=theirs))
    second = client.choice(_ASK.format(instruction=settings.instruction, question=question, a=theirs, b=ours))
    if first is None or second is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)


class _Client:
    """One endpoint, with its cache."""

    def __init__(self, settings: Judge, cache: Path, sleep: Callable[[float], None]) -> None:
        self._settings = settings
        self._cache = cache
        self._sleep = sleep
        self._key = key_of(settings)
        self.trouble = ""
        """What the last failure was."""

    def choice(self, text: str) -> str | None:
        """`A`, `B` or `C`; None where there was no such answer."""
        known = json.dumps([self._settings.base_url, self._settings.model, text])
        file = self._cache / f"{hashlib.sha256(known.encode()).hexdigest()}.json"
        try:
            said = json.loads(file.read_text(encoding="utf-8"))["choice"]
        except (OSError, ValueError, KeyError, TypeError):
            said = None
        if said in ("A", "B", "C"):
            return str(said)
        answer = self._ask(text)
        letter = None if answer is None else answer.strip().strip("[]()*.'\" ").upper()
        if letter not in ("A", "B", "C"):
            if answer is not None:
                self.trouble = f"it replied {answer[:60]!r} and no letter"
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"choice": letter})
        return letter

    def _ask(self, text: str) -> str | None:
        body = {"model": self._settings.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked with the experiment
            self._settings.base_url.rstrip("/") + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        for attempt in range(_ATTEMPTS):
            wait = min(2.0**attempt, _LONGEST_WAIT)
            try:
                with _OPENER.open(request, timeout=_TIMEOUT) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                self.trouble = f"HTTP {error.code} {error.reason}"
                if error.code in (400, 401, 403, 404):
                    raise _unusable(f"it refuses the request: {self.trouble}") from None
                wait = _asked_wait(error.headers, wait)
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                self.trouble = f"{type(error).__name__}"
            if attempt + 1 < _ATTEMPTS:
                self._sleep(wait)
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host must not be handed the key."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _asked_wait(headers: Message, otherwise: float) -> float:
    try:
        return min(max(float(headers.get("Retry-After", "")), 0.0), _LONGEST_WAIT)
    except ValueError:
        return otherwise


def _unusable(cause: str) -> PipelineError:
    return PipelineError(
        f"the judge cannot be used: {cause}",
        code="judge-failed",
        pointer="/evaluation/judge",
        mend="check `base_url`, `model` and the key; `--no-judge` compares without it",
    )
