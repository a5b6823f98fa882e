"""What rows that are right by themselves show together; all expected values are counted by hand."""

import json

import pytest

from pipeline.data.audit import Measure, merge
from pipeline.data.check import check_file


@pytest.fixture
def check(tmp_path):
    def check(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return check_file(path, **options)

    return check


def pair(prompt="p", chosen="c", rejected="r", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def talk(*contents, system=None, **more):
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns, **more}


def found(report):
    return [(warning.line, warning.code) for warning in report.warnings if warning.code != "few-rows"]


SAME = {
    "keys in another order": (
        talk("a", "b"),
        '{"messages": [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]}',
    ),
    "an id beside it": (pair(), pair(id=7)),
    "content in parts": (talk("a", "b"), talk([{"type": "text", "text": "a"}], "b")),
}
OTHER = {
    "another answer": (pair(), pair(chosen="d")),
    "another system turn": (talk("a", "b", system="s"), talk("a", "b", system="t")),
    "a turn divided elsewhere": (talk("ab", "c", "d", "e"), talk("a", "bc", "d", "e")),
    "tools": (talk("a", "b"), talk("a", "b", tools=[{"name": "now"}])),
    "a name": (
        talk("a", "b"),
        {"messages": [{"role": "user", "content": "a", "name": "Eva"}, talk("a", "b")["messages"][1]]},
    ),
    "messages, and a prompt with its completion": (
        talk("a", "b"),
        {"prompt": talk("a", "b")["messages"][:1], "completion": talk("a", "b")["messages"][1:]},
    ),
}


@pytest.mark.parametrize("rows", SAME.values(), ids=SAME)
def test_rows_that_are_the_same(check, rows):
    report = check(rows)
    assert found(report) == [(2, "duplicate-row")]
    assert report.warnings[0].message == "the same row as at line 1"
    assert report.audit["duplicate_rows"] == 1


@pytest.mark.parametrize("rows", OTHER.values(), ids=OTHER)
def test_rows_that_are_not_the_same(check, rows):
    assert found(check(rows)) == []


def test_opposite_preferences(check):
    report = check([pair(), pair(chosen="r", rejected="x"), pair(chosen="r", rejected="c"), pair("q", "r", "c")])
    (warning,) = (one for one in report.warnings if one.code == "opposite-preference")
    assert (warning.line, report.audit["opposite_rows"]) == (3, 1)
    assert "line 1" in warning.message


def test_a_ranking_in_pairs_contradicts_nothing(check):
    assert (
        found(check([pair(chosen="a", rejected="b"), pair(chosen="b", rejected="c"), pair(chosen="a", rejected="c")]))
        == []
    )


def test_warnings_are_counted_beyond_those_that_are_kept(check):
    report = check([pair()] * 40, max_errors=3)
    assert len(report.warnings) == 3
    assert report.warning_counts["duplicate-row"] == report.audit["duplicate_rows"] == 39


@pytest.mark.parametrize(
    ("longer", "shorter", "word"),
    [(21, 9, "longer"), (9, 21, "shorter"), (20, 10, None), (10, 20, None), (20, 8, None)],  # 20 of 28: too few rows
)
def test_length_bias(check, longer, shorter, word):
    rows = [pair(str(number), "x" * 13, "x" * 9 + "y") for number in range(longer)]
    rows += [pair(str(number), "x" * 5, "y" * 6) for number in range(longer, longer + shorter)]
    report = check(rows)
    assert [code for _, code in found(report)] == (["length-bias"] if word else [])
    if word:
        assert f"`chosen` is the {word} one in 70% of the rows" in report.warnings[0].message
    length = report.audit["length"]
    assert (length["chosen_longer"], length["rejected_longer"], length["equal"]) == (longer, shorter, 0)
    # 13 - 10 = 3 each, 5 - 6 = -1 each
    assert length["mean_difference"] == round((3 * longer - shorter) / (longer + shorter), 2)
    assert length["median_difference"] == (3 if longer >= shorter else -1)


def test_distribution():
    measure = Measure()
    for value in [7, 3, 100, 5, 1, 9, 2, 8, 4, 6]:
        measure.add(value)
    # Of ten values the fifth is the smallest that half do not exceed; 95 % of ten is the tenth.
    assert measure.as_dict() == {"count": 10, "mean": 14.5, "min": 1, "p50": 5, "p95": 100, "max": 100}


def test_large_values_are_rounded_down_by_less_than_a_half_percent():
    measure = Measure()
    for value in range(100_000, 200_000):
        measure.add(value)
    assert 149_999 * 0.996 <= measure.quantile(0.5) <= 149_999
    counted = measure.as_dict()
    assert (counted["mean"], counted["min"], counted["max"]) == (149_999.5, 100_000, 199_999)
    assert len(measure._values) < 300


def test_nothing_measured():
    assert Measure().as_dict() == {"count": 0, "mean": 0.0, "min": 0, "p50": 0, "p95": 0, "max": 0}


def test_audits_of_two_files_are_that_of_both_together(check):
    first = [pair(str(number), "x" * (700 + number), "y") for number in range(20)]
    second = [talk("a", "b"), *(pair(str(number), "z", "y" * number) for number in range(2, 9))]
    together = merge([check(first).counts, check(second[1:]).counts])
    assert together == merge([check(first + second[1:]).counts])
