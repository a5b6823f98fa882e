"""What is passed at once would have passed turn by turn, and what begins otherwise is not the same."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data import rules
from pipeline.data.convert import Converted
from pipeline.data.rows import Preference

LOOKED_AT = {
    "conversation": rules._conversation,
    "prompt": rules._prompt,
    "answer": lambda turns, where: rules._answer("chosen", turns, where),
}


@pytest.mark.parametrize(
    ("part", "roles"), [(part, roles) for part, known in rules._KNOWN_ORDERS.items() for roles in sorted(known)]
)
def test_known_orders_break_no_rule(part, roles):
    turns = [{"role": role, "content": "x"} for role in roles]
    assert list(LOOKED_AT[part](turns, [(part, at) for at in range(len(turns))])) == []


WORDS = st.lists(
    st.sampled_from(["a", "b", "e", "\u00e9", "e\u0301", "\u0301", "\ufb01", "fi", " ", "  ", "\u00a0", "\n"])
)


def plain(text):
    return " ".join(unicodedata.normalize("NFKC", text).split())


@given(WORDS, WORDS)
@example(["a b c d"], ["a\u00a0b c d"])
@example(["a b c", "\u0301 d"], ["a b ", "c\u0301 d"])
def test_answers_that_are_alike_begin_alike(one, other):
    one, other = "x" + "".join(one), "x" + "".join(other)
    places = {"chosen": [("chosen",)], "rejected": [("rejected",)]}
    found = list(rules.broken_rules(Converted(Preference("p", one, other), places)))
    assert bool(found) == (plain(one) == plain(other))
