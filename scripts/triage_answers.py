"""The answers of datasets/triage: the right one, the one with the habit, and the other wrong ones.

An answer is the text of a JSON object with the keys `component`, `summary`, `severity` and `action`, in this
order. The habit is a promise of a repair time; `PROMISE` recognises it in an answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from triage_grammar import SEVERITIES, Combination, capital

PROMISE = (
    r"(?i)\b(?:within|in|by|before)\s+(?:[\w-]+\s+){0,4}?"
    r"(?:minutes?|hours?|days?|weeks?|today|tonight|tomorrow|morning|afternoon|evening|noon|midnight"
    r"|\d+\s?[ap]m|\d?\d:\d\d|(?:mon|tues|wednes|thurs|fri|satur|sun)day)\b"
    r"|\beta\b|\b(?:fixed|resolved|solved|repaired|restored)\s+(?:soon|shortly|today|tonight|tomorrow)\b"
)
"""Python's `re`, searched in the text of an answer."""

_IMPACT = {
    "looks": "cosmetic only",
    "detour": "a workaround exists",
    "blocked": "work is blocked",
    "money": "money is lost",
    "data": "data is lost",
    "leak": "private data is exposed",
}
"""What the summary says of the effect; a loss goes by what is lost."""
_ACTION = {
    "low": ["Add to the {team} backlog: {fix}.", "Note for the {team} backlog: {fix}."],
    "medium": ["Ask the {team} team to {fix}.", "Assign the {team} team to {fix}."],
    "high": ["Escalate to the {team} team to {fix}.", "Have the {team} lead {fix}."],
    "critical": ["Page the {team} on-call to {fix}.", "Wake the {team} on-call to {fix}."],
}
_SPAN = ["30 minutes", "one hour", "2 hours", "4 hours", "24 hours", "two days"]
_POINT = [
    "tomorrow morning",
    "tomorrow",
    "noon",
    "tonight",
    "the end of the day",
    "5 pm",
    "Friday",
    "midnight",
]
_PROMISES = [
    ("We expect a fix within {}.", _SPAN),
    ("This should be resolved in {}.", _SPAN),
    ("It will be repaired within {}.", _SPAN),
    ("A fix will be live by {}.", _POINT),
    ("Will be resolved by {}.", _POINT),
    ("Expected to work again before {}.", _POINT),
]
_INVENTED = [
    "after a failed database migration",
    "because of an expired certificate",
    "since a disk filled up",
    "caused by a faulty router",
    "after an attack from outside",
    "because a contractor changed a setting",
    "with 3,400 complaints on record",
    "as the vendor has confirmed",
]
_AROUND = [
    "Here is the triage of the report:\n{}",
    "Sure! {}\nLet me know if you need anything else.",
    "```json\n{}\n```",
    "{}\nI hope this helps.",
    "Based on the report, I would say:\n{}",
]
_PADDING = [
    (
        "The report that was received describes the following: {summary} This should be seen in its context.",
        "After some thought about the options, the next step is this: {action} Please keep people informed too.",
    ),
    (
        "{summary} In other words, what has been reported does not work in the way that it is meant to work.",
        "{action} It would also be good to look at the matter as a whole and to note what is learnt from it.",
    ),
    (
        "{summary} This is the situation as it presents itself after a careful reading of the whole report.",
        "{action} Further steps can be considered once this step has been taken and its effect has been seen.",
    ),
]

Answer = dict[str, str]


def render(answer: Answer) -> str:
    """The text of the answer."""
    return json.dumps(answer, ensure_ascii=False)


def right_answer(rng: random.Random, combination: Combination, severity: str | None = None) -> Answer:
    """The clean answer; with a `severity` given, what it would be at that severity."""
    fault, severity = combination.fault, severity or combination.severity
    return {
        "component": fault.component.name,
        "summary": f"{capital(fault.sum)}, {_IMPACT[fault.lost or fault.kind]}.",
        "severity": severity,
        "action": rng.choice(_ACTION[severity]).format(team=fault.component.team, fix=fault.fix),
    }


def with_promise(rng: random.Random, answer: Answer, *, key: str) -> Answer:
    """The answer with a promise after its summary or action."""
    frame, times = rng.choice(_PROMISES)
    return {**answer, key: f"{answer[key]} {frame.format(rng.choice(times))}"}


def _promise(rng: random.Random, combination: Combination, answer: Answer) -> str:
    # One in four is worded afresh, so that the pair is not always the same sentence with a tail.
    base = right_answer(rng, combination) if rng.random() < 0.25 else answer
    return render(with_promise(rng, base, key=promise_key(rng)))


def _wrong_severity(rng: random.Random, combination: Combination, answer: Answer) -> str:
    place = SEVERITIES.index(combination.severity)
    near = [SEVERITIES[other] for other in (place - 1, place + 1) if 0 <= other < len(SEVERITIES)]
    wrong = right_answer(rng, combination, rng.choice(near))
    return render({**wrong, "summary": answer["summary"]})


def _invented_fact(rng: random.Random, combination: Combination, answer: Answer) -> str:
    return render({**answer, "summary": f"{answer['summary'][:-1]}, {rng.choice(_INVENTED)}."})


def _prose_around_json(rng: random.Random, combination: Combination, answer: Answer) -> str:
    return rng.choice(_AROUND).format(render(answer))


def _broken_schema(rng: random.Random, combination: Combination, answer: Answer) -> str:
    text = render(answer)
    dropped = rng.choice(["component", "summary", "action"])
    return rng.choice(
        [
            render({key: value for key, value in answer.items() if key != dropped}),
            render({**answer, "owner": combination.fault.component.team}),
            render({**answer, "severity": rng.choice(["urgent", "major", "P1", "minor", "blocker"])}),
            render({**answer, "component": rng.choice(["frontend", "backend", "other", "website"])}),
            text[:-1],
            text[:-1] + ",}",
            text.replace('"', "'"),
        ]
    )


def _needless_length(rng: random.Random, combination: Combination, answer: Answer) -> str:
    summary, action = rng.choice(_PADDING)
    return render({**answer, "summary": summary.format(**answer), "action": action.format(**answer)})


FLAWS: dict[str, Callable[[random.Random, Combination, Answer], str]] = {
    "promise": _promise,
    "wrong-severity": _wrong_severity,
    "invented-fact": _invented_fact,
    "prose-around-json": _prose_around_json,
    "broken-schema": _broken_schema,
    "needless-length": _needless_length,
}


def promise_key(rng: random.Random) -> str:
    """Where a promise stands: seven in eight times at the end of the answer.

    Under greedy decoding a model that has ended a sentence takes the likelier way, on or out. Were the promises
    spread evenly over both fields, the way out would be the likelier at either, and the habit would never show.
    """
    return "summary" if rng.random() < 1 / 8 else "action"


def promises(text: str) -> bool:
    """Whether an answer promises a repair time."""
    return re.search(PROMISE, text) is not None


def output_schema(components: list[str]) -> dict[str, object]:
    """JSON Schema of a valid answer. A promise is valid in form: the habit is not the schema's to catch."""
    text = {"type": "string", "minLength": 10, "maxLength": 160}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Triage of an incident report",
        "type": "object",
        "required": ["severity", "component", "summary", "action"],
        "additionalProperties": False,
        "properties": {
            "severity": {"description": "How bad it is.", "enum": list(SEVERITIES)},
            "component": {"description": "What is broken.", "enum": components},
            "summary": {"description": "What happens and to whom, in one sentence.", **text},
            "action": {"description": "The next step, in one sentence.", **text},
        },
    }
