import json

import pytest

from pipeline.data import near
from pipeline.data.check import check_file
from pipeline.data.near import NearDuplicates
from pipeline.data.rows import Demonstration, Preference

WORDS = [f"w{number}" for number in range(102)]
TEXT = " ".join(WORDS)


def row(text, completion="yes"):
    return Demonstration(prompt=text, completion=completion)


def similar(*rows):
    compared = NearDuplicates()
    for one in rows:
        compared.add(one)
    return [(one.number, one.earlier, round(one.similarity, 4)) for one in compared.found]


def changed(*places):
    """The text with other words at some places; each is in three runs of three words."""
    return " ".join(f"other{number}" if number in places else word for number, word in enumerate(WORDS))


def test_the_share_of_runs_in_both():
    # 103 words, 101 runs. One word changed: 3 runs lost and 3 gained, 98 / 104.
    assert similar(row(TEXT), row(changed(50))) == [(1, 0, round(98 / 104, 4))]
    # Three words changed, apart from each other: 92 / 110.
    assert similar(row(TEXT), row(changed(20, 50, 80))) == [(1, 0, round(92 / 110, 4))]


def test_below_the_threshold():
    # Four words changed: 89 / 113 = 0.788.
    assert similar(row(TEXT), row(changed(20, 40, 60, 80))) == []


def test_case_and_spaces_make_no_difference():
    assert similar(row(TEXT), row(TEXT.upper().replace(" ", "\n "))) == [(1, 0, 1.0)]


def test_the_most_similar_earlier_row_is_named():
    assert similar(row(TEXT), row(changed(10)), row(changed(10), "YES"))[-1] == (2, 1, 1.0)


def test_system_turns_do_not_count():
    def talk(system, question):
        turns = [("system", system), ("user", question), ("assistant", "No.")]
        return Demonstration(messages=[{"role": role, "content": text} for role, text in turns])

    assert similar(talk(TEXT, "Is it late?"), talk(TEXT, "Who are you?")) == []
    assert similar(talk(TEXT, "Is it late?"), talk("Be kind.", "Is it late?")) == [(1, 0, 1.0)]


def test_preferences_are_compared_with_both_answers():
    # 104 words, 102 runs, of which the last differs.
    assert similar(Preference("p", TEXT, "no"), Preference("p", TEXT, "never")) == [(1, 0, round(101 / 103, 4))]
    assert similar(Preference("p", TEXT, "no"), Preference("p", TEXT, changed(*range(50)))) == []


def test_short_texts_and_odd_ones():
    assert similar(row("a", "b"), row("a", "c"), row("a", "b"), row("\ud800", "b")) == [(2, 0, 1.0)]


def test_no_more_rows_are_compared_than_fit(monkeypatch):
    monkeypatch.setattr(near, "MAX_ROWS", 2)
    compared = NearDuplicates()
    for text in (TEXT, "something else", TEXT):
        compared.add(row(text))
    assert (compared.rows, compared.found) == (2, [])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [TEXT, changed(50), TEXT, "another"]
    path.write_text("".join(json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts))
    return path


def test_warning_beside_exact_duplicates(path):
    report = check_file(path, near=True)
    assert [(one.line, one.code) for one in report.warnings[:2]] == [(3, "duplicate-row"), (2, "near-duplicate")]
    assert report.warnings[1].message == "94% the same as the row at line 1"
    assert report.audit["near_duplicates"] == {"compared": 4, "found": 1}


def test_not_looked_for_unless_asked(path):
    report = check_file(path)
    assert "near-duplicate" not in report.warning_counts
    assert "near_duplicates" not in report.audit
