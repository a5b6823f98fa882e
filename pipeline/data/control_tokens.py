"""A model's own control tokens, and other models', found in what people wrote.

A text such as `<|im_end|>` inside a message becomes structure once the rendered conversation is tokenised: the turn
ends there, and what follows it may be read as another speaker's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.data.rows import Demonstration, Message, Preference
from pipeline.data.tokens import render
from pipeline.errors import PipelineError

_KNOWN = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("<s>", "</s>", "<bos>", "<eos>"),
)
"""Markers of widespread chat formats. Many tokenizers do not list them as special though their template uses them."""


class Control(NamedTuple):
    """A marker in a text of a row."""

    marker: str
    where: str
    """`the user's turn 1`, or `completion`."""
    structure: bool
    """Whether the model reads it as structure; otherwise it is another model's, and ordinary text to this one."""


class ControlTokens:
    """The markers that must not stand in the texts of one tokenizer's rows."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_tokens)
        # Added tokens that are not special are ordinary words of some tokenizers: HTML tags, runs of spaces.
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = {marker for marker in special if marker.strip()}
        self._template = _probe(tokenizer)
        longest_first = sorted(self._special.union(_KNOWN), key=lambda marker: (-len(marker), marker))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def in_row(self, row: Demonstration | Preference) -> Iterator[Control]:
        """Every marker in a row's texts, once for each text."""
        if isinstance(row, Preference):
            parts = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
        elif row.messages is not None:
            parts = {"messages": row.messages}
        else:
            parts = {"prompt": row.prompt or "", "completion": row.completion or ""}
        for name, part in parts.items():
            if isinstance(part, str):
                # Plain text is taken as it stands, control tokens that its author wrote included; the eos token at
                # the end of a completion is the usual one.
                body = part if name == "prompt" else part.removesuffix(self._tokenizer.eos_token)
                yield from self._in_text(body, f"`{name}`")
                continue
            for number, message in enumerate(part, 1):
                where = f"turn {number} ({message['role']})" + ("" if name == "messages" else f" of `{name}`")
                yield from self._in_text(_texts(message), where)

    def _in_text(self, text: str, where: str) -> Iterator[Control]:
        found = dict.fromkeys(self._pattern.findall(text))
        if not found:
            return
        ids = set(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        for marker in found:
            special = marker in self._special and self._tokenizer.convert_tokens_to_ids(marker) in ids
            yield Control(marker, where, special or marker in self._template)


def _texts(message: Message) -> str:
    calls = message.get("tool_calls")
    return str(message["content"]) + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _probe(tokenizer: Any) -> str:
    """The template, and what it makes of a conversation: some put their markers together from pieces."""
    if tokenizer.chat_template is None:
        return ""
    turns = [{"role": role, "content": "-"} for role in ("user", "assistant", "user")]
    try:
        rendered = render(tokenizer, turns, add_generation_prompt=True)
    except PipelineError:
        rendered = ""
    return f"{tokenizer.chat_template}\n{rendered}"
