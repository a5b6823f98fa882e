import pytest

from pipeline.data.place import excerpt, line_and_column, pointer, printable, shown


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), ""),
        (("messages", 0, "role"), "/messages/0/role"),
        (("a/b", "m~n", ""), "/a~1b/m~0n/"),  # RFC 6901, section 5
        (("\ud83d",), "/\\ud83d"),
        (("x" * 99,), "/" + "x" * 59 + "…"),
    ],
)
def test_pointer(keys, expected):
    assert pointer(keys) == expected


def test_printable_keeps_length_and_drops_what_a_terminal_acts_on():
    text = "ä\x1b[31m\u202e\n\ud800 好"
    assert printable(text) == "ä�[31m� � 好"
    assert len(printable(text)) == len(text)


def test_shown_is_cut():
    assert shown("x" * 60) == "x" * 60
    assert shown("x" * 61) == "x" * 59 + "…"


@pytest.mark.parametrize(("offset", "expected"), [(0, (5, 1)), (2, (5, 3)), (3, (6, 1)), (5, (6, 3))])
def test_line_and_column(offset, expected):
    assert line_and_column("ab\ncde", offset, 0, 5) == expected


@pytest.mark.parametrize("offset", [0, 1, 40, 150, 250, 298, 299])
def test_excerpt_holds_the_value_under_its_caret(offset):
    """A line of 300 characters between two others; each character tells its offset."""
    line = "".join(chr(0x4E00 + index) for index in range(300))
    piece = excerpt(f"before\n{line}\nafter", len("before\n") + offset)
    assert piece.text[piece.caret] == line[offset]
    assert len(piece.text) <= 98
    assert piece.text.startswith("…") == (offset > 32)
    assert piece.text.endswith("…") == (offset < 236)


def test_excerpt_at_the_end_of_a_line():
    assert excerpt('{"a":', 5) == ('{"a":', 5)
    assert excerpt("", 0) == ("", 0)
