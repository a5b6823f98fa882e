import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.strict_json import JsonError, StrictJson, locate, oddities

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=25,
)


def ways(value, keys=()):
    yield keys, value
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ways(inner, (*keys, key))


@given(VALUES, st.sampled_from([None, 0, 3]), st.booleans(), st.sampled_from(["", " ", "\n\t"]))
def test_every_value_is_found_where_it_stands(value, indent, ascii_only, before):
    """Reading on from the place that is given for a value, with the standard library, gives that value."""
    text = before + json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    expected = dict(ways(value))
    found = locate(text, len(before), set(expected))
    assert found.keys() == expected.keys()
    for keys, offset in found.items():
        assert text[offset] not in " \t\n\r"
        assert json.JSONDecoder().raw_decode(text, offset)[0] == expected[keys]


def test_only_what_is_wanted_is_located():
    assert locate('{"a": [1, {"b": 2}]}', 0, {("a", 1, "b"), ("c",)}) == {("a", 1, "b"): 16}


def test_the_last_of_equal_keys_counts():
    text = '{"a": 1, "a": 2}'
    assert text[locate(text, 0, {("a",)})[("a",)]] == str(StrictJson().parse(text, 0).value["a"])


@given(VALUES)
def test_ordinary_json_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps(value, ensure_ascii=False)
    parsed = StrictJson().parse("  " + text + " ", 0)
    assert parsed.value == value
    assert parsed.end == 2 + len(text)
    if parsed.odd:  # U+0000 from st.text(), or many brackets
        assert all(finding.code in ("nul-character", "nesting-too-deep") for finding in oddities(text, 0))


@pytest.mark.parametrize(
    ("text", "offset", "code"),
    [
        ("", 0, "invalid-json"),
        ("nul", 0, "invalid-json"),
        ('{"a" 1}', 5, "invalid-json"),
        ('{"a": 01}', 7, "invalid-json"),
        ('"a\0"', 2, "nul-character"),
        ('"a', 0, "invalid-json"),
    ],
)
def test_what_is_no_json_is_refused_at_its_offset(text, offset, code):
    with pytest.raises(JsonError) as caught:
        StrictJson().parse(text, 0)
    assert (caught.value.finding.offset, caught.value.finding.code) == (offset, code)


def test_oddities_stand_in_order_with_their_ways():
    text = '{"a": [NaN, 1e400, {"b": 1, "b": "\\ud800"}], "\\u0000": 99999999999999999999}'
    found = [(finding.keys, finding.code, finding.offset) for finding in oddities(text, 0)]
    assert found == [
        (("a", 0), "not-a-number", 7),
        (("a", 1), "number-out-of-range", 12),
        (("a", 2, "b"), "duplicate-key", 28),
        (("a", 2, "b"), "unpaired-surrogate", 33),
        (("\0",), "nul-character", 45),
        (("\0",), "number-out-of-range", 55),
    ]


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, -(2**63), 10**18, 1.7e308])
def test_large_numbers_that_fit_keep_their_value(number):
    text = json.dumps(number)
    assert StrictJson().parse(text, 0).value == number
    assert list(oddities(text, 0)) == []


def test_a_reader_forgets_the_last_row():
    reader = StrictJson()
    assert reader.parse("NaN", 0).odd
    assert not reader.parse("1", 0).odd
