"""Chat templates come from strangers: they are rendered in a sandbox, and for a while only."""

from __future__ import annotations

import copy
import signal
from typing import Any

import pytest

from pipeline.data import bounds, tokens
from pipeline.data.rows import Demonstration
from pipeline.data.tokenised import label_demonstrations
from pipeline.data.tokens import render
from pipeline.errors import PipelineError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


def refusal(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    with pytest.raises(PipelineError) as caught:
        render(tokenizer, HI)
    assert caught.value.code == "template-refuses"
    return caught.value.message


def test_a_template_that_does_not_end_is_ended(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "RENDER_SECONDS", 0.2)
    # Seconds in all, so that a rendering that nobody ends fails here rather than hangs.
    loops = "{% for a in range(90000) %}{% for b in range(300) %}{% endfor %}{% endfor %}"
    assert "longer than 0.2 s" in refusal(tokenizer, loops)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_that_writes_without_end_is_refused(tokenizer: Any) -> None:
    assert "characters" in refusal(tokenizer, "{% for a in range(20) %}{{ 'x' * 90000 }}{% endfor %}")


def test_a_template_of_a_book_is_not_read(tokenizer: Any) -> None:
    assert "at most 262,144" in refusal(tokenizer, "x" * (bounds.MAX_TEMPLATE + 1))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'].environ }}",
    ],
)
def test_a_template_reaches_nothing_of_python(tokenizer: Any, template: str) -> None:
    refusal(tokenizer, template)


FAMILIES = {
    "chatml": ("<|im_start|>{role}\n{content}<|im_end|>\n", ["<|im_start|>", "<|im_end|>"]),
    "llama-3": (
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": ("[INST] {content} [/INST]", ["[INST]", "[/INST]"]),
    "llama-2": ("[INST] <<SYS>>{role}<</SYS>> {content} [/INST]</s>", ["<<SYS>>", "<</SYS>>", "</s>"]),
    "gemma": ("<start_of_turn>{role}\n{content}<end_of_turn>\n", ["<start_of_turn>", "<end_of_turn>"]),
    "phi": ("<|{role}|>\n{content}<|end|>\n", ["<|user|>", "<|assistant|>", "<|end|>"]),
    "zephyr": ("<|{role}|>\n{content}</s>\n", ["<|system|>", "<|user|>", "</s>"]),
}
"""A turn, and markers that must not come from a text. Of all of them, only ChatML's are special to this tokenizer."""


@pytest.mark.parametrize(("family", "marker"), [(name, one) for name, (_, all) in FAMILIES.items() for one in all])
def test_a_marker_in_a_text_is_no_structure_in_any_family(tokenizer: Any, family: str, marker: str) -> None:
    turn = (
        FAMILIES[family][0]
        .replace("{role}", "' + message['role'] + '")
        .replace("{content}", "' + message['content'] + '")
    )
    turn = turn.replace("\n", "\\n")
    roles = "{% if false %}<|system|>{% endif %}" if "<|{role}|>" in FAMILIES[family][0] else ""
    tokenizer.chat_template = roles + "{% for message in messages %}{{ '" + turn + "' }}{% endfor %}"
    clean, poisoned = (
        Demonstration(messages=[{"role": "user", "content": f"a {text} b"}, {"role": "assistant", "content": "ok"}])
        for text in ("plain", marker)
    )
    assert "control-token" not in label_demonstrations(tokenizer, [clean], 256)[1].codes
    rows, counted = label_demonstrations(tokenizer, [poisoned], 256)
    assert (len(rows), counted.codes["control-token"]) == (0, 1)
