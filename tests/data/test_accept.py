"""The fast yes is never said of what `jsonschema` refuses, and is said of ordinary rows."""

import copy
import json
import math

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pipeline.data.accept import fast_accept
from pipeline.data.convert import _CONVERTERS
from pipeline.data.schema import _fast, _validator
from pipeline.data.strict_json import JsonError, StrictJson

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {"zone": "UTC"}}}]}
SAID = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}
FORMATS = {
    ("demonstration", "messages"): {"messages": [PARTS, CALL, {"role": "tool", "content": ""}, ANSWER], "tools": [{}]},
    ("demonstration", "conversational-prompt-completion"): {"prompt": [USER], "completion": [ANSWER]},
    ("demonstration", "standard-prompt-completion"): {"prompt": "a", "completion": "b", "tools": "[]"},
    ("preference", "conversational-preference"): {"prompt": [USER], "chosen": [ANSWER], "rejected": [CALL]},
    ("preference", "standard-preference"): {"prompt": "a", "chosen": "b", "rejected": "c", "id": 1},
    ("preference", "conversational-implicit-prompt"): {
        "chosen": [USER, ANSWER],
        "rejected": [USER, CALL],
        "tools": "[]",
    },
    ("preference", "standard-implicit-prompt"): {"chosen": "a b", "rejected": "a c"},
    ("preference", "ultrafeedback-binarized"): {"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
    ("preference", "hh-transcripts"): {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
    ("preference", "question-preference"): {"system": "", "question": "a", "chosen": "b", "rejected": "c"},
    ("preference", "input-preference"): {"system": None, "input": "a", "chosen": "b", "rejected": "c"},
    ("preference", "response-preference"): {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
    ("demonstration", "openai-chat"): {
        "messages": [USER, {**ANSWER, "weight": 0}, USER, {**SAID, "weight": 1}],
        "tools": [{}],
    },
    ("preference", "openai-preference"): {
        "input": {"messages": [USER], "tools": [{}]},
        "preferred_output": [SAID],
        "non_preferred_output": [ANSWER],
    },
    ("demonstration", "alpaca"): {
        "instruction": "a",
        "input": "",
        "output": "b",
        "system": "c",
        "history": [["d", "e"]],
    },
    ("preference", "alpaca-preference"): {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
    ("preference", "alpaca-ranked"): {"instruction": "a", "input": "b", "output": ["c", "d"]},
    ("demonstration", "sharegpt"): {
        "conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}],
        "system": "b",
        "tools": "[]",
    },
    ("preference", "sharegpt-preference"): {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
}
# Where engines and readers are known to differ from each other.
NASTY_TEXTS = [
    "",
    " ",
    "\x1c",
    "\x1f",
    "\x85",
    "\u180e",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\xa0",
    "\0",
    "\ud800",
    "a\udc00",
]
NASTY_TEXTS += ["\U0001f44d", "\n\n", "\u2060\u200d", "text", "user", "assistant", "tool", "function", "null", "\u3000"]
NASTY = [
    None,
    True,
    False,
    0,
    1,
    -0.0,
    1.0,
    1e308,
    1 + 2**-52,
    5e-324,
    -1,
    2,
    math.nan,
    math.inf,
    -math.inf,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
]
NASTY += [*NASTY_TEXTS, [], {}, [[]], {"": 0}, {"role": None}, [None], {"\ud800": 1}]
DEEP: object = "x"
for _ in range(300):
    DEEP = [DEEP]


def ways(value, way=()):
    yield way
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ways(inner, (*way, key))


def with_value(row, way, value):
    row = copy.deepcopy(row)
    at = row
    for key in way[:-1]:
        at = at[key]
    at[way[-1]] = value
    return row


def agree(kind, format, row):
    """What the two say of the row; whatever is accepted by either was accepted by the one that decides."""
    fast, slow = _fast(kind, format)(row), _validator(kind, format).is_valid(row)
    assert fast <= slow, (format, row)
    return fast, slow


@pytest.mark.parametrize(("kind", "format"), FORMATS, ids=[format for _, format in FORMATS])
def test_ordinary_rows_are_accepted_at_once(kind, format):
    assert agree(kind, format, FORMATS[kind, format]) == (True, True)


@pytest.mark.parametrize(("kind", "format"), FORMATS, ids=[format for _, format in FORMATS])
def test_every_value_of_a_good_row_replaced_by_every_nasty_one(kind, format):
    """Both agree, but for what the fast one cannot take: half a surrogate pair, deep nesting, endless numbers."""
    row = FORMATS[kind, format]
    said = {True: 0, False: 0}
    for way in ways(row):
        for value in [*NASTY, DEEP]:
            fast, slow = agree(kind, format, with_value(row, way, value) if way else value)
            said[slow] += 1
            if slow and not fast:
                assert value is DEEP or any(0xD800 <= ord(one) < 0xE000 for one in str(value)) or value == 10**400
    assert min(said.values()) > 10


@pytest.mark.parametrize(("kind", "format"), FORMATS, ids=[format for _, format in FORMATS])
def test_every_key_left_out_or_doubled(kind, format):
    row = FORMATS[kind, format]
    for way in ways(row):
        if way and isinstance(way[-1], str):
            for other in ("content", "role", "x"):
                cut = copy.deepcopy(row)
                at = cut
                for key in way[:-1]:
                    at = at[key]
                at[other] = at.pop(way[-1])
                fast, slow = agree(kind, format, cut)
                assert fast == slow


def test_every_format_is_here():
    assert {format for _, format in FORMATS} == set(_CONVERTERS)


WORDS = ["messages", "prompt", "completion", "chosen", "rejected", "tools", "role", "content", "tool_calls"]
WORDS += ["function", "name", "arguments", "type", "text", "user", "assistant", "system", "tool", "weight"]
WORDS += ["instruction", "input", "output", "history", "conversations", "from", "value", "human", "gpt", "question"]
VALUES = st.recursive(
    st.sampled_from(NASTY) | st.sampled_from(WORDS) | st.text(max_size=3) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=2), inner, max_size=5)
        | st.fixed_dictionaries({"role": st.sampled_from(WORDS), "content": inner})
    ),
    max_leaves=15,
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(FORMATS)), VALUES)
@example(("preference", "standard-preference"), {"prompt": "\x1c", "chosen": "\u180e", "rejected": "\u0085"})
def test_generated_values(which, value):
    agree(*which, value)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_mutated_good_rows(data):
    which = data.draw(st.sampled_from(sorted(FORMATS)))
    row = FORMATS[which]
    for _ in range(data.draw(st.integers(1, 3))):
        way = data.draw(st.sampled_from([way for way in ways(row) if way]))
        row = with_value(row, way, data.draw(VALUES))
    agree(*which, row)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_mutated_bytes(data):
    """From the bytes on: what is read, strictly, is accepted by the fast one only if `jsonschema` accepts it."""
    which = data.draw(st.sampled_from(sorted(FORMATS)))
    good = json.dumps(FORMATS[which]).encode()
    at = data.draw(st.integers(0, len(good)))
    upto = data.draw(st.integers(at, min(at + 12, len(good))))
    nasty = [b"NaN", b"1e999", b'"\\ud800"', b"18446744073709551616", b'"prompt":1,', b"[" * 70, b"\xff", b"\\u0000"]
    text = good[:at] + data.draw(st.sampled_from(nasty) | st.binary(max_size=4)) + good[upto:]
    try:
        parsed = StrictJson().parse(text.decode("utf-8", "surrogateescape"), 0)
    except JsonError:
        return
    agree(*which, parsed.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": ["null", "integer"]},
        {"const": 1.5},
        {"const": True},
        {"const": 2**53},
        {"enum": ["a", 1.0]},
        {"enum": [1, True]},
        {"pattern": "^a+$"},
        {"pattern": "[^a-z]+"},
        {"format": "uri"},
        {"$ref": "https://example.invalid/schema"},
        {"properties": {"a": {"minimum": 1}}},
        {"unevaluatedProperties": False},
    ],
)
def test_what_leaves_room_for_another_opinion_is_never_accepted(schema):
    accepts = fast_accept({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    assert not any(accepts(value) for value in (1, 1.0, "aa", "a", "B", None, {"a": 1}))


NUMBERS = [value for value in NASTY if isinstance(value, int | float)] + ["0", "1", [0], {"0": 1}, 1 - 2**-53, 10**400]


@pytest.mark.parametrize("schema", [{"enum": [0, 1, None]}, {"const": 0}, {"not": {"enum": [1]}}, {"const": -7}])
def test_small_integers_are_equal_to_the_same_numbers_for_both(schema):
    accepts = fast_accept({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    for value in NUMBERS:
        assert accepts(value) == Draft202012Validator(schema).is_valid(value), value


CLASS = {"type": "string", "pattern": "[^\\s\\u200b-\\u200d\\u2060\\ufeff]"}
FAST_CLASS = fast_accept(CLASS)


@given(st.text(max_size=3) | st.characters())
def test_a_class_of_characters_means_what_python_means(text):
    fast, slow = FAST_CLASS(text), Draft202012Validator(CLASS).is_valid(text)
    assert fast == slow or any(0xD800 <= ord(one) < 0xE000 for one in text)


def test_orjson_would_not_do_as_the_reader():
    """Why rows are read by the standard library: what is wrong here would pass unseen."""
    assert orjson.loads('{"a": 1, "a": 2}') == {"a": 2}
    assert isinstance(orjson.loads("18446744073709551616"), float)
    for text in ('{"a": 1, "a": 2}', "18446744073709551616"):
        assert StrictJson().parse(text, 0).odd
