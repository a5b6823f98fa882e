from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.masks import IGNORED, label_demonstration, label_demonstrations
from pipeline.data.rows import Demonstration
from pipeline.errors import PipelineError

ONE_TURN = [{"role": "user", "content": "Which light?"}, {"role": "assistant", "content": "The red light."}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still red."}]
SYSTEM_TURN = {"role": "system", "content": "Be short."}
TOOL_TURNS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Which light?"},
    {"role": "assistant", "content": "look()"},
    {"role": "tool", "content": "red"},
    {"role": "assistant", "content": "Red."},
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's shape: a system turn joins the first user turn, the assistant is called model, its content is stripped.
GEMMA = (
    "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ first if loop.first else '' }}{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Qwen3's shape: the last assistant turn carries a thought block, which earlier turns lose.
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template whose turns end with nothing but a line break.
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    import copy

    return copy.deepcopy(tiny_tokenizer)


def trained(tokenizer: Any, row: Demonstration, max_length: int | None = None) -> list[str]:
    """The runs of tokens in the loss, each decoded on its own: an account independent of character offsets."""
    labelled = label_demonstration(tokenizer, row, max_length)
    assert len(labelled.input_ids) == len(labelled.labels)
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(labelled.input_ids, labelled.labels, strict=True):
        if label == IGNORED:
            inside = False
            continue
        assert label == token
        if not inside:
            runs.append([])
        runs[-1].append(token)
        inside = True
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, ONE_TURN, ["The red light.<|im_end|>"]),
        (CHATML, TWO_TURNS, ["The red light.<|im_end|>", "Still red.<|im_end|>"]),
        (CHATML, TOOL_TURNS, ["look()<|im_end|>", "Red.<|im_end|>"]),
        (GEMMA, TWO_TURNS, ["The red light.<|im_end|>", "Still red.<|im_end|>"]),
        (
            GEMMA,
            [{"role": "system", "content": "Be short."}, *TWO_TURNS],
            ["The red light.<|im_end|>", "Still red.<|im_end|>"],
        ),
        (QWEN3, ONE_TURN, ["<think>\n\n</think>\n\nThe red light.<|im_end|>"]),
        (QWEN3, TWO_TURNS, ["The red light.<|im_end|>", "<think>\n\n</think>\n\nStill red.<|im_end|>"]),
    ],
    ids=["one", "two", "tool", "gemma", "gemma-system", "qwen3-one", "qwen3-two"],
)
def test_assistant_turns_and_their_stop_tokens_are_in_the_loss(
    tokenizer: Any, template: str, messages: list[Any], expected: list[str]
) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # where a mask by pad id would lose the stop token
    tokenizer.chat_template = template
    assert trained(tokenizer, Demonstration(messages=messages)) == expected


def test_ids_are_those_of_the_rendered_conversation(tokenizer: Any) -> None:
    labelled = label_demonstration(tokenizer, Demonstration(messages=TWO_TURNS))
    assert labelled.input_ids == tokenizer.apply_chat_template(TWO_TURNS, return_dict=True)["input_ids"]


def test_assistant_turns_of_the_prompt_are_not_trained_on(tokenizer: Any) -> None:
    assert trained(tokenizer, Demonstration(messages=TWO_TURNS, prompt_turns=3)) == ["Still red.<|im_end|>"]


def test_a_template_without_a_stop_gets_the_eos_token(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    row = Demonstration(messages=ONE_TURN)
    assert trained(tokenizer, row) == ["The red light.\n<|im_end|>"]


def test_plain_text(tokenizer: Any) -> None:
    assert trained(tokenizer, Demonstration(prompt="Which light? ", completion="Red.")) == ["Red.<|im_end|>"]
    ended = Demonstration(prompt="Which light? ", completion="Red.<|im_end|>")
    assert trained(tokenizer, ended) == ["Red.<|im_end|>"]


def test_a_repeated_answer_is_found_at_its_own_turn(tokenizer: Any) -> None:
    """The content of an earlier turn stands in the question as well, and both turns say the same."""
    tokenizer.chat_template = QWEN3
    messages = [
        {"role": "user", "content": "Say red<|im_end|>\n."},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Again red"},
        {"role": "assistant", "content": "red"},
    ]
    assert trained(tokenizer, Demonstration(messages=messages)) == [
        "red<|im_end|>",
        "<think>\n\n</think>\n\nred<|im_end|>",
    ]


def test_truncation_is_counted_and_rows_without_loss_are_left_out(tokenizer: Any) -> None:
    long_prompt = [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}]
    long_answer = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 80}]
    rows = [Demonstration(messages=messages) for messages in (ONE_TURN, long_prompt, long_answer)]
    labelled, counted = label_demonstrations(tokenizer, rows, 40)
    assert (counted.rows, counted.used, counted.truncated, counted.dropped) == (3, 2, 2, 1)
    assert counted.dropped_rows == [2]
    assert [len(row["input_ids"]) for row in labelled] == [len(labelled[0]["input_ids"]), 40]
    assert counted.tokens == sum(len(row["input_ids"]) for row in labelled)
    assert counted.loss_tokens == sum(label != IGNORED for row in labelled for label in row["labels"])


def test_no_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(PipelineError) as caught:
        label_demonstration(tokenizer, Demonstration(messages=ONE_TURN))
    assert caught.value.code == "no-chat-template"


def test_a_template_that_refuses_is_a_message(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(PipelineError, match="no system turns here") as caught:
        label_demonstration(tokenizer, Demonstration(messages=ONE_TURN))
    assert caught.value.code == "template-refuses"


def test_a_template_that_hides_a_turn_is_a_message(tokenizer: Any) -> None:
    """Earlier turns are left out altogether: nothing of the first assistant turn could be trained on."""
    tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}"
        "<|im_start|>{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    with pytest.raises(PipelineError) as caught:
        label_demonstration(tokenizer, Demonstration(messages=TWO_TURNS))
    assert caught.value.code == "template-not-prefix"
