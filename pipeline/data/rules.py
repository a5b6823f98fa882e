"""What a JSON Schema cannot say of a row: the order of turns, and that a preference prefers something."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.data.convert import Converted
from pipeline.data.convert.base import Places
from pipeline.data.place import Finding, Keys
from pipeline.data.rows import Message, Preference
from pipeline.data.schema import is_blank

_Where = Sequence[Keys]

# fmt: off
_KNOWN_ORDERS: dict[str, set[tuple[str, ...]]] = {
    "conversation": {
        ("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant"),
        ("system", "user", "assistant", "user", "assistant"),
    },
    "prompt": {("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user")},
    "answer": {("assistant",)},
}
# fmt: on
"""The roles of most rows, which break no rule: the others are looked at turn by turn."""
_HEAD = 64
_PROMPT_WORDS = 3
"""An answer may begin with one or two words of a prompt by chance."""


def broken_rules(converted: Converted) -> Iterator[Finding]:
    """Every rule that the row breaks."""
    row, places = converted
    if isinstance(row, Preference):
        yield from _preference(row, places)
    elif row.messages is not None:
        where = places["messages"]
        if cut := row.prompt_turns:
            yield from _blank(row.messages, where)
            yield from _prompt(row.messages[:cut], where[:cut])
            yield from _answer("completion", row.messages[cut:], where[cut:])
        elif not _plainly_right("conversation", row.messages):
            yield from _blank(row.messages, where)
            yield from _conversation(row.messages, where)
    else:
        yield from _repeated(row.prompt or "", "completion", row.completion or "", places["completion"][0])


def _preference(row: Preference, places: Places) -> Iterator[Finding]:
    if not (isinstance(row.prompt, str) or _plainly_right("prompt", row.prompt)):
        yield from _blank(row.prompt, places["prompt"])
        yield from _prompt(row.prompt, places["prompt"])
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not (isinstance(answer, str) or _plainly_right("answer", answer)):
            yield from _blank(answer, places[name])
            yield from _answer(name, answer, places[name])
        elif isinstance(answer, str) and isinstance(row.prompt, str):
            yield from _repeated(row.prompt, name, answer, places[name][0])
    if not _begin_alike(row.chosen, row.rejected):
        return
    at = places["rejected"][0][:1]
    if _said(row.chosen) == _said(row.rejected):
        yield Finding("chosen-equals-rejected", "`chosen` and `rejected` are the same", at)
    elif _normalised(row.chosen) == _normalised(row.rejected):
        message = "`chosen` and `rejected` differ in spaces or in how characters are encoded alone"
        yield Finding("chosen-equals-rejected", message, at)


def _repeated(prompt: str, name: str, answer: str, at: Keys) -> Iterator[Finding]:
    """A plain text that begins with all of its prompt, which then stands twice in what is trained on.

    In a conversation an answer may do so: a sentence that was to be corrected and needed no correction.
    """
    prompt = prompt.strip()
    if answer.lstrip().startswith(prompt) and len(prompt.split()) >= _PROMPT_WORDS:
        yield Finding("completion-repeats-prompt", f"`{name}` begins with the whole prompt", at)


def _blank(messages: list[Message], where: _Where) -> Iterator[Finding]:
    """Content that came in parts: the schema sees each part, not that all are blank."""
    for message, keys in zip(messages, where, strict=True):
        if is_blank(message["content"]) and message["role"] != "tool" and not message.get("tool_calls"):
            yield Finding("empty-content", "`content` is blank", (*keys, "content"))


def _conversation(messages: list[Message], where: _Where) -> Iterator[Finding]:
    yield from _order(messages, where, None)
    if not any(message["role"] == "assistant" for message in messages):
        yield Finding("no-assistant-turn", "no turn is the assistant's", where[-1][:1])
    elif messages[-1]["role"] != "assistant":
        message = f"the last turn is the {_name(messages[-1])}, not the assistant's"
        yield Finding("last-not-assistant", message, (*where[-1], "role"))


def _prompt(messages: list[Message], where: _Where) -> Iterator[Finding]:
    yield from _order(messages, where, None)
    if messages[-1]["role"] not in ("user", "tool"):
        message = f"the prompt ends with the {_name(messages[-1])} turn"
        yield Finding("prompt-last-not-user", message, (*where[-1], "role"))


def _answer(name: str, messages: list[Message], where: _Where) -> Iterator[Finding]:
    """`completion`, `chosen` or `rejected`."""
    if messages[0]["role"] != "assistant":
        message = f"`{name}` begins with the {_name(messages[0])} turn, not the assistant's"
        yield Finding("first-not-assistant", message, (*where[0], "role"))
    yield from _order(messages[1:], where[1:], messages[0])
    if len(messages) > 1 and messages[-1]["role"] != "assistant":
        message = f"`{name}` ends with the {_name(messages[-1])} turn, not the assistant's"
        yield Finding("last-not-assistant", message, (*where[-1], "role"))


def _plainly_right(part: str, messages: list[Message]) -> bool:
    """Whether turns break no rule as most do not: known roles, and something to be seen in each."""
    roles, contents = tuple([message["role"] for message in messages]), [message["content"] for message in messages]
    return roles in _KNOWN_ORDERS[part] and not any(map(is_blank, contents))


def _order(messages: list[Message], where: _Where, before: Message | None) -> Iterator[Finding]:
    """Turns that follow what they cannot follow. `before`: the turn before these; None: they begin."""
    for index, (message, keys) in enumerate(zip(messages, where, strict=True)):
        role, at = message["role"], (*keys, "role")
        if role in ("system", "developer"):
            if index or before is not None:
                yield Finding("system-not-first", f"a {role} message after the first turn", at)
            continue
        if before is None:
            if role != "user":
                text = f"the conversation begins with the {_name(message)} turn, not the user's"
                yield Finding("first-not-user", text, at)
        elif role == "tool":
            if before["role"] != "tool" and not before.get("tool_calls"):
                yield Finding("stray-tool-result", "a tool's result that no tool call came before", at)
        elif role == before["role"]:
            yield Finding("roles-not-alternating", f"two {role} turns, one after the other", at)
        before = message


def _name(message: Message) -> str:
    """The role as a possessive: `the user's turn`."""
    role = message["role"]
    return role if role in ("system", "developer") else f"{role}'s"


def _said(answer: str | list[Message]) -> Any:
    """What an answer says and does, without what else its messages carry."""
    if isinstance(answer, str):
        return answer
    return [(message["role"], message["content"], message.get("tool_calls")) for message in answer]


def _begin_alike(one: str | list[Message], other: str | list[Message]) -> bool:
    """False only where the first three words differ however they are normalised, which saves comparing the rest."""
    first, second = (answer if isinstance(answer, str) else answer[0]["content"][:_HEAD] for answer in (one, other))
    first, second = first[:_HEAD], second[:_HEAD]
    if not (first.isascii() and second.isascii()):
        return True
    words, others = first.split(None, 3), second.split(None, 3)
    # A fourth word shows that the third is whole; nothing in ASCII is changed by normalising.
    return len(words) < 4 or len(others) < 4 or words[:3] == others[:3]


def _normalised(answer: str | list[Message]) -> Any:
    """The same with compatibility characters and runs of white space made alike (Unicode NFKC)."""
    if isinstance(answer, str):
        return " ".join(unicodedata.normalize("NFKC", answer).split())
    return [(role, _normalised(content), calls) for role, content, calls in _said(answer)]
