from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.masks import IGNORED, label_demonstration
from pipeline.data.rows import Demonstration
from pipeline.data.tokenised import label_demonstrations
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
# Llama 3's shape: headers of three tokens, a stop token and no line break behind it, tools answer as ipython.
LLAMA3 = (
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ 'ipython' if message['role'] == 'tool' else message['role'] }}<|end_header_id|>\n\n"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% endfor %}'
    "{% else %}{{ message['content'] | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Mistral's shape: no generation prompt, a space before the answer, tools beside the last user turn, and the system
# turn inside the user turn that ends the conversation, so that it is gone once the answer follows.
MISTRAL = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}<s>"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{% if tools and message == asked[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if system and loop.last %}{{ system }}\n\n{% endif %}{{ message['content'] }}[/INST]"
    "{% elif message['role'] == 'tool' %}[TOOL_RESULTS] {{ message['content'] }}[/TOOL_RESULTS]"
    "{% elif message.tool_calls %}[TOOL_CALLS] {{ message.tool_calls[0].function.name }}</s>"
    "{% else %} {{ message['content'] | trim }}</s>{% endif %}{% endfor %}"
)
MARKERS = {
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "light"}}}
CALL_TURNS = [
    {"role": "user", "content": "Which light?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "red"},
    {"role": "assistant", "content": "Red."},
]
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


def with_markers(tokenizer: Any, template: str, eos: str) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(marker, special=True) for marker in MARKERS[template]], special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = eos
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        (ONE_TURN, None, ["The red light.<|eot_id|>"]),
        (TWO_TURNS, None, ["The red light.<|eot_id|>", "Still red.<|eot_id|>"]),
        ([SYSTEM_TURN, *TWO_TURNS], None, ["The red light.<|eot_id|>", "Still red.<|eot_id|>"]),
        (CALL_TURNS, [TOOL], ['{"name": "look", "parameters": {"at": "light"}}<|eot_id|>', "Red.<|eot_id|>"]),
    ],
    ids=["one", "two", "system", "tool"],
)
def test_llama_3(tokenizer: Any, messages: list[Any], tools: Any, expected: list[str]) -> None:
    with_markers(tokenizer, LLAMA3, "<|eot_id|>")
    assert trained(tokenizer, Demonstration(messages=messages, tools=tools)) == expected


@pytest.mark.parametrize(
    ("messages", "tools", "expected", "alike"),
    [
        (ONE_TURN, None, [" The red light.</s>"], True),
        (TWO_TURNS, None, [" The red light.</s>", " Still red.</s>"], True),
        # The prompt alone has the system turn, the conversation has not: nothing of the user's may be trained on.
        ([SYSTEM_TURN, *ONE_TURN], None, [" The red light.</s>"], False),
        ([SYSTEM_TURN, *TWO_TURNS], None, [" The red light.</s>", " Still red.</s>"], False),
        # Before the first answer the tools stand beside the first question, and at the end beside the second.
        (TWO_TURNS, [TOOL], [" The red light.</s>", " Still red.</s>"], False),
        (CALL_TURNS, [TOOL], ["[TOOL_CALLS] look</s>", " Red.</s>"], True),
    ],
    ids=["one", "two", "system", "system-two", "tools-two", "tool"],
)
def test_mistral(tokenizer: Any, messages: list[Any], tools: Any, expected: list[str], alike: bool) -> None:
    with_markers(tokenizer, MISTRAL, "</s>")
    row = Demonstration(messages=messages, tools=tools)
    assert trained(tokenizer, row) == expected
    assert (label_demonstration(tokenizer, row).unlike is None) is alike


def test_a_stop_token_without_a_name_is_a_stop(tokenizer: Any) -> None:
    """Phi's `<|end|>` is special, and neither the eos token nor any other that has a name."""
    with_markers(tokenizer, LLAMA3, "<|im_end|>")
    assert trained(tokenizer, Demonstration(messages=ONE_TURN)) == ["The red light.<|eot_id|>"]


def test_turns_that_are_not_to_be_trained_on(tokenizer: Any) -> None:
    row = Demonstration(messages=TWO_TURNS, trained_turns=(1,))
    assert trained(tokenizer, row) == ["The red light.<|im_end|>"]


@pytest.mark.builtin_model
@pytest.mark.parametrize("messages", [ONE_TURN, TWO_TURNS, [SYSTEM_TURN, *TWO_TURNS], TOOL_TURNS])
def test_smollm2(messages: list[Any]) -> None:
    """Against the decoded ids, cut at the markers: an account that knows nothing of offsets or of rendering twice."""
    import re

    from pipeline.experiment import Model
    from pipeline.model.base import find_base, load_tokenizer

    smollm2 = load_tokenizer(find_base(Model()), Model(), None)
    row = Demonstration(messages=messages)
    whole = smollm2.decode(label_demonstration(smollm2, row).input_ids)
    turns = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", whole, re.DOTALL)
    assert trained(smollm2, row) == turns
    assert [turn.removesuffix("<|im_end|>") for turn in turns] == [
        message["content"] for message in messages if message["role"] == "assistant"
    ]


def test_ids_are_those_of_the_rendered_conversation(tokenizer: Any) -> None:
    labelled = label_demonstration(tokenizer, Demonstration(messages=TWO_TURNS))
    assert labelled.input_ids == tokenizer.apply_chat_template(TWO_TURNS, return_dict=True)["input_ids"]


def test_assistant_turns_of_the_prompt_are_not_trained_on(tokenizer: Any) -> None:
    assert trained(tokenizer, Demonstration(messages=TWO_TURNS, prompt_turns=3)) == ["Still red.<|im_end|>"]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [((1,), ["The red light.<|im_end|>"]), ((3,), ["Still red.<|im_end|>"]), (None, None)],
)
def test_turns_that_are_not_to_be_trained_on_are_outside_the_loss(
    tokenizer: Any, turns: tuple[int, ...] | None, expected: list[str] | None
) -> None:
    row = Demonstration(messages=TWO_TURNS, trained_turns=turns)
    both = ["The red light.<|im_end|>", "Still red.<|im_end|>"]
    assert trained(tokenizer, row) == (expected or both)


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
