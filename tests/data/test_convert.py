import pytest

from pipeline.data.convert import RefusedError, convert
from pipeline.data.rows import Demonstration, Preference

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALLS = [{"function": {"name": "now", "arguments": {}}}]


def test_messages_are_kept_with_their_extra_keys():
    value = {"messages": [{**USER, "name": "Ada"}, ANSWER], "tools": [{"name": "now"}], "id": 7}
    row, places = convert(value, "messages", 3)
    assert row == Demonstration(messages=[{**USER, "name": "Ada"}, ANSWER], tools=[{"name": "now"}])
    assert (row.prompt_turns, row.line) == (0, 3)
    assert places == {"messages": (("messages", 0), ("messages", 1))}


def test_parts_are_joined_and_nulls_dropped():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]
    turns = [
        {"role": "user", "content": parts, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": []},
    ]
    row, _ = convert({"messages": turns, "tools": None}, "messages", 1)
    assert row.messages == [
        {"role": "user", "content": "ab\n"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": ""},
    ]
    assert row.tools is None


def test_prompt_and_completion_become_one_conversation():
    value = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    row, places = convert(value, "conversational-prompt-completion", 1)
    assert row == Demonstration(messages=[USER, ANSWER, USER, ANSWER], prompt_turns=3)
    assert places["messages"] == (("prompt", 0), ("prompt", 1), ("prompt", 2), ("completion", 0))


def test_text_is_taken_as_it_stands():
    row, _ = convert({"prompt": " a", "completion": "b\n"}, "standard-prompt-completion", 1)
    assert row == Demonstration(prompt=" a", completion="b\n")
    row, places = convert({"prompt": "a", "chosen": "b", "rejected": "c"}, "standard-preference", 1)
    assert row == Preference("a", "b", "c")
    assert places == {"prompt": (("prompt",),), "chosen": (("chosen",),), "rejected": (("rejected",),)}


def test_preference_in_messages():
    other = {"role": "assistant", "content": [{"type": "text", "text": "Go"}]}
    value = {"prompt": [USER], "chosen": [ANSWER], "rejected": [other]}
    row, _ = convert(value, "conversational-preference", 1)
    assert row == Preference([USER], [ANSWER], [{"role": "assistant", "content": "Go"}])


@pytest.mark.parametrize(
    ("tools", "expected"), [('[{"name": "now"}]', [{"name": "now"}]), ("[]", None), ([], None), (None, None)]
)
def test_tools_as_text(tools, expected):
    assert convert({"messages": [USER, ANSWER], "tools": tools}, "messages", 1).row.tools == expected


@pytest.mark.parametrize("tools", ["", "{}", "[1]", "[{}] x", "null", '[{"a": NaN}]', "[" * 100_000])
def test_text_that_is_no_list_of_tools_is_refused(tools):
    with pytest.raises(RefusedError) as caught:
        convert({"messages": [USER, ANSWER], "tools": tools}, "messages", 1)
    assert (caught.value.finding.code, caught.value.finding.keys) == ("invalid-tools", ("tools",))


def test_the_file_s_row_is_left_alone():
    value = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]}
    convert(value, "messages", 1)
    assert value["messages"][0]["content"] == [{"type": "text", "text": "a"}]
