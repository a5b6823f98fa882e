"""The published schemas, and their translation into findings."""

import urllib.request

import pytest
from jsonschema import Draft202012Validator
from referencing.exceptions import Unresolvable

from pipeline.data.formats import detect_format
from pipeline.data.schema import _validator, is_blank, load_schema, violations

KINDS = ("demonstration", "preference")
MESSAGE = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize("kind", KINDS)
def test_schema_is_a_schema(kind):
    schema = load_schema(kind)
    Draft202012Validator.check_schema(schema)
    forms = [part["$ref"].removeprefix("#/$defs/") for part in schema["anyOf"]]
    assert set(forms) == set(schema["$defs"]) - {"text", "turns", "part", "tool-call", "tools"}


def test_both_schemas_mean_the_same_by_a_message():
    mine, other = (load_schema(kind)["$defs"] for kind in KINDS)
    shared = mine.keys() & other.keys()
    assert shared == {"text", "turns", "part", "tool-call", "tools"}
    assert all(mine[name] == other[name] for name in shared)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", {"messages": [MESSAGE, ANSWER]}),
        ("demonstration", {"messages": [MESSAGE, {"role": "assistant"}]}),
        ("demonstration", {"messages": [MESSAGE, {"role": "assistant", "content": "", "tool_calls": []}]}),
        ("demonstration", {"messages": [{**MESSAGE, "role": "tool", "content": ""}]}),
        ("demonstration", {"messages": [{**MESSAGE, "role": "tool", "content": None}]}),
        ("demonstration", {"messages": []}),
        ("demonstration", {"messages": [MESSAGE], "tools": [1]}),
        ("demonstration", {"prompt": [MESSAGE], "completion": [ANSWER]}),
        ("demonstration", {"prompt": "a", "completion": "b"}),
        ("demonstration", {"prompt": "a", "completion": [ANSWER]}),
        ("demonstration", {"prompt": "a"}),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": None}),
        ("preference", {"prompt": [MESSAGE], "chosen": [ANSWER], "rejected": [ANSWER]}),
        ("preference", {"prompt": [MESSAGE], "chosen": "b", "rejected": [ANSWER]}),
        ("preference", {"prompt": [MESSAGE], "chosen": [ANSWER]}),
    ],
)
def test_the_definition_that_is_picked_agrees_with_the_whole_schema(kind, row):
    whole = Draft202012Validator(load_schema(kind)).is_valid(row)
    assert (list(violations(row, kind, detect_format(row, kind))) == []) == whole


def test_nothing_is_fetched(monkeypatch):
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: asked.append(args))
    remote = _validator("preference", "standard-preference").evolve(schema={"$ref": "https://example.invalid/x"})
    with pytest.raises(Unresolvable):
        list(remote.iter_errors({}))
    assert asked == []


def test_mends_name_what_to_type():
    def mend(row, kind="demonstration"):
        (finding,) = violations(row, kind, detect_format(row, kind))
        return finding.mend

    assert mend({"messages": [{"role": "gpt", "content": "x"}]}) == "write `assistant`"
    assert mend({"messages": [{"role": "User ", "content": "x"}]}) == "write `user`"
    assert mend({"messages": [{"role": "wizard", "content": "x"}]}) is None
    assert mend({"messages": [{"from": "user", "content": "x"}]}) == "rename `from` to `role`"
    assert mend({"messages": [{"role": "user", "contnet": "x"}]}) == "rename `contnet` to `content`"
    assert mend({"prompt": "a", "response": "b"}) == "rename `response` to `completion`"
    assert mend({"prompt": "a", "chosen": "b"}, "preference") == "add `rejected`"


def test_messages_say_what_there_is_and_what_there_should_be():
    def messages(row):
        return [finding.message for finding in violations(row, "demonstration", detect_format(row, "demonstration"))]

    assert messages({"messages": "Hi"}) == ["`messages` is text, not a list"]
    assert messages({"messages": [1]}) == ["the item is a number, not an object"]
    assert messages({"messages": [{"role": "user", "content": True}]}) == ["`content` is a boolean, not text or a list"]
    assert messages({"prompt": "a", "completion": [ANSWER]}) == ["`prompt` is text, `completion` is not"]


@pytest.mark.parametrize(
    ("text", "blank"), [("", True), (" \t\n\u00a0\u2003\u200b", True), (" x ", False), ("。", False)]
)
def test_is_blank(text, blank):
    assert is_blank(text) == blank
