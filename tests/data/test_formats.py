"""Each format's documented shape is accepted and converted exactly; each of its rules catches its breach in place."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from pipeline.data.check import check_file, load_rows
from pipeline.data.rows import Demonstration, Preference
from pipeline.data.schema_files import _FILES, definition, load_schema

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

# The row as it stands in a file, and the canonical row written by hand.
GOOD = {
    "openai-chat": (
        {
            "messages": [
                system("Marv is sarcastic."),
                user("What's the capital of France?"),
                assistant("Paris", weight=0),
                user("Can you be more sarcastic?"),
                assistant("Paris, as if everyone doesn't know that already.", weight=1),
            ]
        },
        Demonstration(
            messages=[
                system("Marv is sarcastic."),
                user("What's the capital of France?"),
                assistant("Paris"),
                user("Can you be more sarcastic?"),
                assistant("Paris, as if everyone doesn't know that already."),
            ],
            trained_turns=(4,),
        ),
    ),
    "openai-chat with tool calls": (
        {
            "messages": [
                user("What is the weather in San Francisco?"),
                {"role": "assistant", "tool_calls": [call("weather", '{"place": "San Francisco, USA"}', id="call_1")]},
                {"role": "tool", "tool_call_id": "call_1", "content": "21.0"},
                assistant([{"type": "text", "text": "21 degrees"}, {"type": "text", "text": " now"}]),
            ],
            "tools": [TOOL],
            "parallel_tool_calls": False,
        },
        Demonstration(
            messages=[
                user("What is the weather in San Francisco?"),
                assistant("", tool_calls=[call("weather", {"place": "San Francisco, USA"}, id="call_1")]),
                {"role": "tool", "tool_call_id": "call_1", "content": "21.0"},
                assistant("21 degrees now"),
            ],
            tools=[TOOL],
        ),
    ),
    "openai-preference": (
        {
            "input": {
                "messages": [user("How cold is San Francisco today?")],
                "tools": [],
                "parallel_tool_calls": True,
            },
            "preferred_output": [assistant("50 to 60 degrees.")],
            "non_preferred_output": [assistant("Not particularly cold.")],
        },
        Preference(
            [user("How cold is San Francisco today?")],
            [assistant("50 to 60 degrees.")],
            [assistant("Not particularly cold.")],
        ),
    ),
    "openai-preference between a call and an answer": (
        {
            "input": {"messages": [user("Weather?")], "tools": [TOOL]},
            "preferred_output": [{"role": "assistant", "content": None, "tool_calls": [call("weather", "{}")]}],
            "non_preferred_output": [assistant("No idea.")],
        },
        Preference(
            [user("Weather?")],
            [assistant("", tool_calls=[call("weather", {})])],
            [assistant("No idea.")],
            tools=[TOOL],
        ),
    ),
    "alpaca": (
        {"instruction": "Name three primes.", "input": "", "output": "2, 3, 5"},
        Demonstration(messages=[user("Name three primes."), assistant("2, 3, 5")]),
    ),
    "alpaca with everything": (
        {
            "instruction": "Sum up.",
            "input": "A long text.",
            "output": "Short.",
            "system": "Be brief.",
            "history": [["Hi", "Hello"], ["More?", "Yes"]],
        },
        Demonstration(
            messages=[
                system("Be brief."),
                user("Hi"),
                assistant("Hello"),
                user("More?"),
                assistant("Yes"),
                user("Sum up.\nA long text."),
                assistant("Short."),
            ]
        ),
    ),
    "alpaca-preference": (
        {"instruction": "Sum up.", "input": "A text.", "chosen": "Short.", "rejected": "Looong."},
        Preference([user("Sum up.\nA text.")], [assistant("Short.")], [assistant("Looong.")]),
    ),
    "alpaca-ranked": (
        {"instruction": "Sum up.", "input": "", "output": ["Short.", "Looong."]},
        Preference([user("Sum up.")], [assistant("Short.")], [assistant("Looong.")]),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "The area of 5 by 3?"},
                {"from": "function_call", "value": '{"name": "area", "arguments": {"sides": [5, 3]}}'},
                {"from": "observation", "value": '{"area": 15}'},
                {"from": "gpt", "value": "15."},
            ],
            "system": "Use tools.",
            "tools": '[{"name": "area", "parameters": {}}]',
        },
        Demonstration(
            messages=[
                system("Use tools."),
                user("The area of 5 by 3?"),
                assistant("", tool_calls=[call("area", {"sides": [5, 3]})]),
                {"role": "tool", "content": '{"area": 15}'},
                assistant("15."),
            ],
            tools=[{"name": "area", "parameters": {}}],
        ),
    ),
    "sharegpt with two calls and a system turn": (
        {
            "conversations": [
                {"from": "system", "value": "Be quick."},
                {"from": "human", "value": "Both?"},
                {
                    "from": "function_call",
                    "value": '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": "{\\"x\\": 1}"}]',
                },
            ],
            "system": "Be slow.",
            "tools": "[]",
        },
        Demonstration(
            messages=[
                system("Be quick."),
                user("Both?"),
                assistant("", tool_calls=[call("a", {}), call("b", {"x": 1})]),
            ]
        ),
    ),
    "sharegpt-preference": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "A joke?"},
            ],
            "chosen": {"from": "gpt", "value": "A horse walks into a bar."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        Preference(
            [user("Hi"), assistant("Hello"), user("A joke?")],
            [assistant("A horse walks into a bar.")],
            [assistant("No.")],
        ),
    ),
    "hh-transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A poem,\n\nplease\n\nAssistant: Roses",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A poem,\n\nplease\n\nAssistant: No. ",
        },
        Preference(
            [user("Hi"), assistant("Hello!"), user("A poem,\n\nplease")], [assistant("Roses")], [assistant("No.")]
        ),
    ),
    "ultrafeedback-binarized": (
        {
            "prompt": "Which is larger?",
            "prompt_id": "f0e37e9f",
            "chosen": [user("Which is larger?"), assistant("The sun.")],
            "rejected": [user("Which is larger?"), assistant("The moon.")],
            "messages": [user("Which is larger?"), assistant("The sun.")],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        Preference([user("Which is larger?")], [assistant("The sun.")], [assistant("The moon.")]),
    ),
    "ultrafeedback-binarized from distilabel": (
        {
            "prompt": "Hi",
            "prompt_id": "3639",
            "chosen": [system("Be kind."), user("Hi"), assistant("Hello, dear.")],
            "chosen_model": "a",
            "chosen_rating": 5,
            "rejected": [system("Be kind."), user("Hi"), assistant("What?")],
            "rejected_model": "b",
            "rejected_rating": 1,
        },
        Preference([system("Be kind."), user("Hi")], [assistant("Hello, dear.")], [assistant("What?")]),
    ),
    "conversational-implicit-prompt": (
        {
            "chosen": [user("What color is the sky?"), assistant("It is blue.")],
            "rejected": [user("What color is the sky?"), assistant("It is green.")],
        },
        Preference([user("What color is the sky?")], [assistant("It is blue.")], [assistant("It is green.")]),
    ),
    "standard-implicit-prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Preference("The sky is", " blue.", " green."),
    ),
    "question-preference": (
        {"system": "You are helpful.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        Preference([system("You are helpful."), user("2 + 2?")], [assistant("4")], [assistant("5")]),
    ),
    "question-preference without a system message": (
        {"system": "", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        Preference([user("2 + 2?")], [assistant("4")], [assistant("5")]),
    ),
    "input-preference": (
        {"system": "", "input": "2 + 2?", "chosen": "4", "rejected": "5", "generations": ["4", "5"], "status": "tie"},
        Preference([user("2 + 2?")], [assistant("4")], [assistant("5")]),
    ),
    "response-preference": (
        {
            "source": "evol_instruct",
            "instruction": "2 + 2?",
            "chosen_response": "4",
            "rejected_response": "5",
            "chosen_avg_rating": 4.5,
        },
        Preference([user("2 + 2?")], [assistant("4")], [assistant("5")]),
    ),
}


def kind_of(row):
    return "preference" if isinstance(row, Preference) else "demonstration"


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("name", "row", "expected"), [(name, *case) for name, case in GOOD.items()], ids=GOOD)
def test_documented_shape_is_converted_exactly(tmp_path, name, row, expected):
    path = written(tmp_path, row)
    report = check_file(path)
    assert report.errors == []
    assert (report.format, report.kind) == (name.split()[0], kind_of(expected))
    (converted,) = load_rows(path, kind_of(expected)).rows
    assert converted == expected


def test_every_format_has_a_documented_shape():
    assert {name.split()[0] for name in GOOD} == set(_FILES)


@pytest.mark.parametrize("name", sorted(set(_FILES.values())))
def test_schema_is_a_schema(name):
    schema = load_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:preference-pipeline:schema:{name}:1"
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("format", _FILES)
def test_definition_stands_by_itself(format):
    text = json.dumps(definition("preference", format))
    assert '"$ref": "#/$defs/' in text
    assert '"$ref": "urn:' not in text


def but(name, **changes):
    """The documented row with some keys replaced; None takes a key away."""
    row = {**GOOD[name][0], **changes}
    return {key: value for key, value in row.items() if value is not None}


def turns(*pairs):
    return [{"from": who, "value": said} for who, said in pairs]


CHAT, PAIR, TALK, HH = "openai-chat", "openai-preference", "sharegpt", "hh-transcripts"
UF, ASK = "ultrafeedback-binarized", "question-preference"
# A broken row below a good one of the same format: (format, row, [(pointer, code)] on line 2).
BROKEN = {
    "weight of 2": (
        CHAT,
        {"messages": [user("a"), assistant("b", weight=2)]},
        [("/messages/1/weight", "invalid-value")],
    ),
    "weight as text": (
        CHAT,
        {"messages": [user("a"), assistant("b", weight="1")]},
        [("/messages/1/weight", "invalid-value")],
    ),
    "weight of a user turn": (
        CHAT,
        {"messages": [{**user("a"), "weight": 1}, assistant("b")]},
        [("/messages/0/weight", "invalid-value")],
    ),
    "all weights 0": (CHAT, {"messages": [user("a"), assistant("b", weight=0)]}, [("/messages", "nothing-to-train")]),
    "arguments are no JSON": (
        CHAT,
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [call("f", "{x: 1}")]}]},
        [("/messages/1/tool_calls/0/function/arguments", "invalid-arguments")],
    ),
    "arguments are a list": (
        CHAT,
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [call("f", "{}"), call("f", "[1]")]}]},
        [("/messages/1/tool_calls/1/function/arguments", "invalid-arguments")],
    ),
    "arguments are a number": (
        CHAT,
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [call("f", 1)]}, assistant("b", weight=1)]},
        [("/messages/1/tool_calls/0/function/arguments", "wrong-type")],
    ),
    "arguments with a key twice": (
        CHAT,
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [call("f", '{"x": 1, "x": 2}')]}]},
        [("/messages/1/tool_calls/0/function/arguments", "invalid-arguments")],
    ),
    "old function role": (
        CHAT,
        {"messages": [user("a"), {"role": "function", "name": "f", "content": "1"}, assistant("b", weight=1)]},
        [("/messages/1/role", "unknown-role")],
    ),
    "image in a message": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                assistant("b", weight=1),
            ]
        },
        [("/messages/0/content/0/type", "unsupported-part")],
    ),
    "audio in a message": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, assistant("b", weight=1)]},
        [("/messages/0/content/0/type", "unsupported-part")],
    ),
    "blank parts": (
        CHAT,
        {"messages": [user([{"type": "text", "text": " "}]), assistant("b", weight=1)]},
        [("/messages/0/content", "empty-content")],
    ),
    "input is text": (PAIR, but(PAIR, input="Hi"), [("/input", "wrong-type")]),
    "input without messages": (PAIR, but(PAIR, input={"tools": []}), [("/input", "missing-key")]),
    "input ends with assistant": (
        PAIR,
        but(PAIR, input={"messages": [user("a"), assistant("b")]}),
        [("/input/messages/1/role", "prompt-last-not-user")],
    ),
    "no preferred output": (PAIR, but(PAIR, preferred_output=None), [("", "missing-key")]),
    "no other output": (PAIR, but(PAIR, non_preferred_output=None), [("", "missing-key")]),
    "empty preferred output": (PAIR, but(PAIR, preferred_output=[]), [("/preferred_output", "no-messages")]),
    "preferred output is text": (PAIR, but(PAIR, preferred_output="Yes"), [("/preferred_output", "wrong-type")]),
    "preferred output of the user": (
        PAIR,
        but(PAIR, preferred_output=[user("50 to 60 degrees.")]),
        [("/preferred_output/0/role", "first-not-assistant")],
    ),
    "outputs equal": (
        PAIR,
        but(PAIR, non_preferred_output=[assistant("50  to 60 degrees.")]),
        [("/non_preferred_output", "chosen-equals-rejected")],
    ),
    "tools of the input": (
        PAIR,
        but(PAIR, input={"messages": [user("a")], "tools": "now"}),
        [("/input/tools", "invalid-tools")],
    ),
    "no instruction": ("alpaca", but("alpaca", instruction=None), [("", "missing-key")]),
    "blank instruction": ("alpaca", but("alpaca", instruction=" "), [("/instruction", "empty-content")]),
    "no output": ("alpaca", but("alpaca", output=None), [("", "missing-key")]),
    "empty output": ("alpaca", but("alpaca", output=""), [("/output", "empty-content")]),
    "output is a number": ("alpaca", but("alpaca", output=7), [("/output", "wrong-type")]),
    "input is a list": ("alpaca", but("alpaca", input=["x"]), [("/input", "wrong-type")]),
    "system is a number": ("alpaca", but("alpaca", system=1), [("/system", "wrong-type")]),
    "history is text": ("alpaca", but("alpaca", history="Hi"), [("/history", "wrong-type")]),
    "exchange of three": ("alpaca", but("alpaca", history=[["a", "b", "c"]]), [("/history/0", "invalid-value")]),
    "exchange of one": ("alpaca", but("alpaca", history=[["a", "b"], ["c"]]), [("/history/1", "invalid-value")]),
    "exchange without an answer": (
        "alpaca",
        but("alpaca", history=[["a", ""]]),
        [("/history/0/1", "empty-content")],
    ),
    "exchange of a number": ("alpaca", but("alpaca", history=[[1, "a"]]), [("/history/0/0", "wrong-type")]),
    "picture of an instruction": ("alpaca", but("alpaca", images=["cat.png"]), [("/images", "unsupported-media")]),
    "no chosen": ("alpaca-preference", but("alpaca-preference", chosen=None), [("", "missing-key")]),
    "empty rejected": ("alpaca-preference", but("alpaca-preference", rejected=""), [("/rejected", "empty-content")]),
    "same answers": (
        "alpaca-preference",
        but("alpaca-preference", rejected="Short."),
        [("/rejected", "chosen-equals-rejected")],
    ),
    "three outputs": ("alpaca-ranked", but("alpaca-ranked", output=["a", "b", "c"]), [("/output", "invalid-value")]),
    "one output": ("alpaca-ranked", but("alpaca-ranked", output=["a"]), [("/output", "invalid-value")]),
    "blank second output": (
        "alpaca-ranked",
        but("alpaca-ranked", output=["a", " "]),
        [("/output/1", "empty-content")],
    ),
    "equal outputs": (
        "alpaca-ranked",
        but("alpaca-ranked", output=["a", "a "]),
        [("/output", "chosen-equals-rejected")],
    ),
    "conversations is text": (TALK, but(TALK, conversations="Hi"), [("/conversations", "wrong-type")]),
    "no turns": (TALK, but(TALK, conversations=[]), [("/conversations", "no-messages")]),
    "unknown speaker": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("wizard", "b"))),
        [("/conversations/1/from", "unknown-role")],
    ),
    "no value": (
        TALK,
        but(TALK, conversations=[{"from": "human"}, *turns(("gpt", "b"))]),
        [("/conversations/0", "missing-key")],
    ),
    "value is null": (
        TALK,
        but(TALK, conversations=[{"from": "human", "value": None}, *turns(("gpt", "b"))]),
        [("/conversations/0/value", "wrong-type")],
    ),
    "blank value": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("gpt", "\u200b"))),
        [("/conversations/1/value", "empty-content")],
    ),
    "human twice": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("human", "b"), ("gpt", "c"))),
        [("/conversations/1/from", "roles-not-alternating")],
    ),
    "human last": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("gpt", "b"), ("human", "c"))),
        [("/conversations/2/from", "last-not-assistant")],
    ),
    "human alone": (
        TALK,
        but(TALK, conversations=turns(("human", "a"))),
        [("/conversations", "no-assistant-turn")],
    ),
    "gpt first": (
        TALK,
        but(TALK, conversations=turns(("gpt", "b"), ("human", "a"), ("gpt", "b"))),
        [("/conversations/0/from", "first-not-user")],
    ),
    "system turn later": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("system", "s"), ("gpt", "b"))),
        [("/conversations/1/from", "system-not-first")],
    ),
    "observation without a call": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("observation", "1"), ("gpt", "b"))),
        [("/conversations/1/from", "stray-tool-result")],
    ),
    "call is prose": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("function_call", "look it up"))),
        [("/conversations/1/value", "invalid-arguments")],
    ),
    "call without a name": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("function_call", '{"arguments": {}}'))),
        [("/conversations/1/value", "invalid-arguments")],
    ),
    "no calls at all": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("function_call", "[]"))),
        [("/conversations/1/value", "invalid-arguments")],
    ),
    "call with arguments in a list": (
        TALK,
        but(TALK, conversations=turns(("human", "a"), ("function_call", '{"name": "f", "arguments": [1]}'))),
        [("/conversations/1/value", "invalid-arguments")],
    ),
    "tools of prose": (TALK, but(TALK, tools="area(sides)"), [("/tools", "invalid-tools")]),
    "chosen is text": (
        "sharegpt-preference",
        but("sharegpt-preference", chosen="A horse."),
        [("/chosen", "wrong-type")],
    ),
    "rejected by a human": (
        "sharegpt-preference",
        but("sharegpt-preference", rejected={"from": "human", "value": "No."}),
        [("/rejected/from", "first-not-assistant")],
    ),
    "prompt ends with gpt": (
        "sharegpt-preference",
        but("sharegpt-preference", conversations=turns(("human", "a"), ("gpt", "b"))),
        [("/conversations/1/from", "prompt-last-not-user")],
    ),
    "same turn twice": (
        "sharegpt-preference",
        but("sharegpt-preference", rejected={"from": "gpt", "value": "A horse walks into a bar."}),
        [("/rejected", "chosen-equals-rejected")],
    ),
    "no rejected turn": ("sharegpt-preference", but("sharegpt-preference", rejected=None), [("", "missing-key")]),
    "transcript without speakers": (HH, but(HH, chosen="Roses"), [("/chosen", "invalid-transcript")]),
    "transcript begins with the assistant": (
        HH,
        but(HH, rejected="\n\nAssistant: Roses"),
        [("/rejected", "invalid-transcript")],
    ),
    "transcript ends with the human": (
        HH,
        but(HH, chosen="\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye"),
        [("/chosen", "invalid-transcript")],
    ),
    "transcripts of two conversations": (
        HH,
        but(HH, rejected="\n\nHuman: Ho\n\nAssistant: No."),
        [("/rejected", "prompts-differ")],
    ),
    "transcripts equal": (
        HH,
        but(HH, rejected=GOOD[HH][0]["chosen"] + "\n"),
        [("/rejected", "chosen-equals-rejected")],
    ),
    "silent turn in a transcript": (
        HH,
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        [("/chosen", "empty-content")],
    ),
    "silent answer in a transcript": (
        HH,
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
        [("/rejected", "empty-content")],
    ),
    "empty transcript": (HH, but(HH, chosen=""), [("/chosen", "empty-content")]),
    "answers to two prompts": (
        UF,
        but(UF, rejected=[user("Which is smaller?"), assistant("The moon.")]),
        [("/rejected", "no-common-prompt")],
    ),
    "answers that are equal": (
        UF,
        but(UF, rejected=GOOD[UF][0]["chosen"]),
        [("/rejected", "chosen-equals-rejected")],
    ),
    "answer that goes on with the user": (
        UF,
        but(UF, rejected=[user("Which is larger?"), assistant("The moon."), user("Why?")]),
        [("/rejected/2/role", "last-not-assistant")],
    ),
    "unknown role in an answer": (
        UF,
        but(UF, chosen=[user("Which is larger?"), {"role": "gpt", "content": "The sun."}]),
        [("/chosen/1/role", "unknown-role")],
    ),
    "prompt alone in one": (
        "conversational-implicit-prompt",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
        [("/rejected", "no-answer")],
    ),
    "chosen goes on": (
        "conversational-implicit-prompt",
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("b")]},
        [("/rejected", "no-answer")],
    ),
    "text that goes on": (
        "standard-implicit-prompt",
        {"chosen": "The sky is blue", "rejected": "The sky"},
        [("/rejected", "no-answer")],
    ),
    "texts that share nothing": (
        "standard-implicit-prompt",
        {"chosen": "a", "rejected": "b"},
        [("/rejected", "no-common-prompt")],
    ),
    "implicit and of two forms": (
        "conversational-implicit-prompt",
        {"chosen": [user("a"), assistant("b")], "rejected": "b"},
        [("/rejected", "mixed-forms")],
    ),
    "blank question": (ASK, but(ASK, question=" "), [("/question", "empty-content")]),
    "question is a list": (ASK, but(ASK, question=[user("a")]), [("/question", "wrong-type")]),
    "answer is a list": (ASK, but(ASK, chosen=[assistant("4")]), [("/chosen", "wrong-type")]),
    "no rejected answer": (ASK, but(ASK, rejected=None), [("", "missing-key")]),
    "input of a number": ("input-preference", but("input-preference", input=4), [("/input", "wrong-type")]),
    "no rejected response": (
        "response-preference",
        but("response-preference", rejected_response=None),
        [("", "missing-key")],
    ),
    "equal responses": (
        "response-preference",
        but("response-preference", rejected_response="4"),
        [("/rejected_response", "chosen-equals-rejected")],
    ),
    "no question at all": (
        "response-preference",
        but("response-preference", instruction=None),
        [("", "missing-key")],
    ),
}


@pytest.mark.parametrize(("format", "row", "expected"), BROKEN.values(), ids=BROKEN)
def test_broken_row_is_caught_in_its_place(tmp_path, format, row, expected):
    good, canonical = GOOD[format]
    path = written(tmp_path, good, row, good)
    report = check_file(path, kind_of(canonical))
    assert [(error.line, error.pointer, error.code) for error in report.errors] == [(2, *place) for place in expected]
    assert (report.rows, report.valid, report.format) == (3, 2, format)
    for error in report.errors:  # the pointer leads somewhere in the row that the user has
        value = row
        for key in error.pointer.split("/")[1:]:
            value = value[int(key)] if isinstance(value, list) else value[key]


def test_a_file_of_several_formats_is_mixed_and_each_row_held_to_its_own(tmp_path):
    broken = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}
    path = written(tmp_path, GOOD["alpaca"][0], GOOD["sharegpt"][0], broken)
    report = check_file(path)
    assert report.format == "mixed"
    assert report.audit["formats"] == {"alpaca": 1, "sharegpt": 1}
    assert [(error.line, error.pointer) for error in report.errors] == [(3, "/conversations/1/value")]


def test_a_row_that_fits_two_formats_has_the_one_that_the_file_began_with(tmp_path):
    plain = {"messages": [user("a"), assistant("b")]}
    assert check_file(written(tmp_path, GOOD[CHAT][0], plain)).format == "openai-chat"
    assert check_file(written(tmp_path, plain, plain)).format == "messages"


def test_ultrafeedback_serves_as_demonstrations_too(tmp_path):
    path = written(tmp_path, GOOD[UF][0])
    (row,) = load_rows(path, "demonstration").rows
    assert row.messages == [user("Which is larger?"), assistant("The sun.")]


@pytest.mark.parametrize(
    ("row", "mend"),
    [
        ({"instruction": "a", "response": "b"}, "rename `response` to `output`"),
        ({"input": "a", "output": "b"}, "rename `input` to `instruction`"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "write `human`"),
        ({"conversations": [{"from": "Human", "value": "a"}]}, "write `human`"),
        (
            {"conversations": [{"from": "wizard", "value": "a"}]},
            "use `system`, `human`, `gpt`, `function_call` or `observation`",
        ),
    ],
)
def test_mends_name_what_to_type(tmp_path, row, mend):
    assert check_file(written(tmp_path, row)).errors[0].mend == mend


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data beside the checkout is absent")
@pytest.mark.parametrize(
    ("name", "kind", "format", "rows"),
    [
        ("alpaca_en_demo.json", "demonstration", "alpaca", 999),
        ("dpo_en_demo.json", "preference", "sharegpt-preference", 300),
    ],
)
def test_files_as_users_bring_them(name, kind, format, rows):
    path = SHARED / name
    report = check_file(path)
    assert (report.errors, report.kind, report.format, report.valid) == ([], kind, format, rows)
    raw = json.loads(path.read_text())
    checked = load_rows(path, kind)
    for given, row in zip(raw, checked.rows, strict=True):
        if kind == "preference":
            assert [turn["content"] for turn in row.prompt] == [turn["value"] for turn in given["conversations"]]
            assert row.chosen == [assistant(given["chosen"]["value"])]
            assert row.rejected == [assistant(given["rejected"]["value"])]
        else:
            asked = given["instruction"] + ("\n" + given["input"] if given["input"] else "")
            assert row.messages == [user(asked), assistant(given["output"])]
