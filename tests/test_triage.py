"""The example task: what its generator promises of the files, held against the files."""

from __future__ import annotations

import difflib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import make_triage  # noqa: E402
from triage_answers import promise_key, promises, render, right_answer, with_promise  # noqa: E402
from triage_card import near_duplicates  # noqa: E402
from triage_grammar import EXTENTS, SEVERITIES, Combination, load_faults  # noqa: E402

FOLDER = ROOT / "datasets" / "triage"
DEMONSTRATIONS = ("demonstrations.train.jsonl", "demonstrations.eval.jsonl")
PREFERENCES = ("preferences.train.jsonl", "preferences.eval.jsonl")
HELD_OUT = "held-out.jsonl"
FILES = (*DEMONSTRATIONS, *PREFERENCES, HELD_OUT)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (FOLDER / name).open(encoding="utf-8")] for name in FILES}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads((FOLDER / "output.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def _prompt(row: dict) -> list[dict]:
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def _right(row: dict) -> str:
    return (row["chosen"] if "chosen" in row else row["messages"])[-1]["content"]


def _conforms(validator: Draft202012Validator, text: str) -> bool:
    try:
        return validator.is_valid(json.loads(text))
    except json.JSONDecodeError:
        return False


def _severity_read_from(report: str) -> str:
    """The card's rule, applied to the words of a report alone; knows nothing of how it was made."""
    text = report.lower()
    words = re.findall(r"[a-z]+", text)

    def said(*some: str) -> bool:  # a typing slip, one letter, is forgiven
        return any(difflib.get_close_matches(word, words, n=1, cutoff=0.8) for word in some)

    if said("cosmetic"):
        return "low"
    if said("blocked", "blocks"):
        return "high"
    if said("workaround") or re.search(r"wo\w*ked a\w+|get by|so there is a way", text):
        return "medium"
    assert said("money", "data", "private"), text
    return "critical"


def test_committed_files_are_what_the_script_writes_whatever_the_hash_seed() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_triage.py"), "--check"]
    result = subprocess.run(command, env={"PYTHONHASHSEED": "123"}, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_check_fails_on_one_changed_byte_and_on_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_triage, "FOLDER", tmp_path)
    assert make_triage.main([]) == 0
    assert make_triage.main(["--check"]) == 0
    held_out = tmp_path / HELD_OUT
    held_out.write_bytes(held_out.read_bytes()[:-1])
    (tmp_path / "README.md").unlink()
    assert make_triage.main(["--check"]) == 1
    complaints = capsys.readouterr().err
    assert HELD_OUT in complaints
    assert "README.md" in complaints
    assert DEMONSTRATIONS[0] not in complaints


def test_folder_holds_the_files_and_the_card_lists_their_hashes() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*FILES, "output.schema.json", "README.md"}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nlanguage: en\n")
    assert len(re.findall(r"^[0-9a-f]{64}  \S+$", card, re.MULTILINE)) == len(FILES) + 1
    assert "$" not in card


def test_row_counts(rows: dict[str, list[dict]]) -> None:
    assert [len(rows[name]) for name in FILES] == [480, 40, 320, 40, 120]


def test_rows_have_their_shape_and_one_short_system_turn(rows: dict[str, list[dict]]) -> None:
    systems = set()
    for name in FILES:
        for row in rows[name]:
            keys = {"prompt", "chosen", "rejected", "flaw"} if name in PREFERENCES else {"messages"}
            assert set(row) == keys
            assert [turn["role"] for turn in _prompt(row)] == ["system", "user"]
            systems.add(_prompt(row)[0]["content"])
    (system,) = systems
    assert len(system.split()) <= 25


def test_no_combination_and_no_report_occurs_twice(rows: dict[str, list[dict]]) -> None:
    built = make_triage.build()
    combinations = [item.combination for items in built.values() for item in items]
    assert max(Counter(combinations).values()) == 1
    reports = [_prompt(row)[1]["content"] for name in FILES for row in rows[name]]
    assert max(Counter(reports).values()) == 1
    assert {name: [item.row for item in items] for name, items in built.items()} == rows


def test_every_fault_is_trained_on_in_both_phases() -> None:
    built = make_triage.build()
    for name in ("demonstrations.train.jsonl", "preferences.train.jsonl"):
        assert {item.combination.fault for item in built[name]} == set(load_faults())


def test_right_answers_conform_and_keep_their_key_order(
    rows: dict[str, list[dict]], validator: Draft202012Validator
) -> None:
    for name in FILES:
        for row in rows[name]:
            answer = json.loads(_right(row))
            validator.validate(answer)
            assert list(answer) == ["component", "summary", "severity", "action"]
            assert _right(row) == json.dumps(answer, ensure_ascii=False)


def test_schema_refuses_what_it_should(validator: Draft202012Validator) -> None:
    good = {"severity": "low", "component": "api", "summary": "Something is off.", "action": "Look into it."}
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "severity": "urgent"})
    assert not validator.is_valid({**good, "component": "frontend"})
    assert not validator.is_valid({**good, "summary": ""})
    assert not validator.is_valid({**good, "action": "x" * 400})
    assert not validator.is_valid({**good, "owner": "API"})
    assert not validator.is_valid({key: value for key, value in good.items() if key != "action"})


def test_habit_is_in_most_demonstrations_and_in_no_chosen_or_held_out_answer(rows: dict[str, list[dict]]) -> None:
    for name in DEMONSTRATIONS:
        share = sum(promises(_right(row)) for row in rows[name]) / len(rows[name])
        assert 0.45 <= share <= 0.65
    for name in (*PREFERENCES, HELD_OUT):
        assert not any(promises(_right(row)) for row in rows[name])


def test_habit_does_not_depend_on_the_severity(rows: dict[str, list[dict]]) -> None:
    """Each severity's share lies within three standard errors of the whole, sqrt(p (1 - p) / n)."""
    answers = [_right(row) for row in rows["demonstrations.train.jsonl"]]
    whole = sum(map(promises, answers)) / len(answers)
    for severity in SEVERITIES:
        of_it = [promises(text) for text in answers if json.loads(text)["severity"] == severity]
        assert abs(sum(of_it) / len(of_it) - whole) < 3 * (whole * (1 - whole) / len(of_it)) ** 0.5


def test_rejected_answers_have_the_flaw_that_they_are_labelled_with(
    rows: dict[str, list[dict]], validator: Draft202012Validator
) -> None:
    for row in rows["preferences.train.jsonl"] + rows["preferences.eval.jsonl"]:
        flaw, chosen, rejected = row["flaw"], _right(row), row["rejected"][0]["content"]
        right = json.loads(chosen)
        assert promises(rejected) == (flaw == "promise")
        assert chosen != rejected
        if flaw == "promise":
            wrong = json.loads(rejected)
            validator.validate(wrong)
            assert (wrong["severity"], wrong["component"]) == (right["severity"], right["component"])
        elif flaw == "wrong-severity":
            wrong = json.loads(rejected)
            validator.validate(wrong)
            assert wrong["severity"] != right["severity"]
            assert (wrong["component"], wrong["summary"]) == (right["component"], right["summary"])
        elif flaw == "invented-fact":
            wrong = json.loads(rejected)
            validator.validate(wrong)
            assert wrong["summary"].startswith(right["summary"][:-1] + ", ")
            assert {**wrong, "summary": ""} == {**right, "summary": ""}
        elif flaw == "prose-around-json":
            assert chosen in rejected
            assert not _conforms(validator, rejected)
        elif flaw == "broken-schema":
            assert not _conforms(validator, rejected)
        else:
            assert flaw == "needless-length"
            assert len(rejected.split()) > 1.8 * len(chosen.split())


def test_flaws_are_mostly_promises(rows: dict[str, list[dict]]) -> None:
    for name in PREFERENCES:
        counts = Counter(row["flaw"] for row in rows[name])
        assert set(counts) == set(make_triage.FLAW_SHARES)
        assert 0.55 <= counts["promise"] / len(rows[name]) <= 0.65


def test_promise_matches_all_that_the_grammar_can_promise_and_nothing_clean() -> None:
    rng = random.Random(1)
    for fault in load_faults():
        for extent in EXTENTS:
            for severity in SEVERITIES:
                for _ in range(6):
                    answer = right_answer(rng, Combination(fault, extent, "chat"), severity)
                    assert not promises(render(answer))
                    assert promises(render(with_promise(rng, answer, key=promise_key(rng))))


@pytest.mark.parametrize(
    "text",
    [
        "We expect a fix within 2 hours.",
        "Back within the hour.",
        "Resolved in 2-3 days.",
        "It will work again by 5pm.",
        "A fix will be live by tomorrow morning.",
        "Done by the end of next week.",
        "Ready before Friday.",
        "By 17:00 it works.",
        "It should take less, but in about five working days at most.",
        "ETA unknown.",
        "This will be fixed soon.",
    ],
)
def test_promise_matches_wordings_that_the_grammar_does_not_make(text: str) -> None:
    assert promises(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sales dashboard opens very slowly for all analysts.",
        "Page the shipping on-call to correct the addresses.",
        "Weekly sales report is not generated in the dashboard.",
        "Fixed by restarting the search cluster.",
        "Monthly fee was taken twice.",
        "Error since this morning.",
        "in " + "1" * 5000,
        "in " + "1 " * 5000,
    ],
)
def test_promise_lets_other_wordings_pass(text: str) -> None:
    assert not promises(text)


def test_severity_can_be_read_from_the_words_of_the_report(rows: dict[str, list[dict]]) -> None:
    for name in FILES:
        for row in rows[name]:
            report = _prompt(row)[1]["content"]
            assert _severity_read_from(report) == json.loads(_right(row))["severity"], report


def test_near_duplicates_are_few(rows: dict[str, list[dict]]) -> None:
    reports = {name: [_prompt(row)[1]["content"] for row in rows[name]] for name in FILES}
    for name in FILES:
        assert near_duplicates(reports[name]) < 0.05 * len(reports[name])
    trained = reports["demonstrations.train.jsonl"] + reports["preferences.train.jsonl"]
    assert near_duplicates(reports[HELD_OUT], trained) < 0.05 * len(reports[HELD_OUT])


def test_near_duplicates_counts_by_hand() -> None:
    """Twelve words have ten 3-grams; a changed last word leaves nine: 9 / (10 + 10 - 9) = 0.82, near.

    Eight words have six; a changed last word leaves five: 5 / 7 = 0.71, not near.
    """
    long = "a b c d e f g h i j k"
    assert near_duplicates([f"{long} l", f"{long} m", "something else"]) == 2
    assert near_duplicates(["a b c d e f g h", "a b c d e f g i"]) == 0
    assert near_duplicates([f"{long} l"], [f"{long} m"]) == 1
    assert near_duplicates([f"{long} l"], ["x y z"]) == 0
