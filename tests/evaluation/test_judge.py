"""The judge against a small local server that speaks as much of the protocol as it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.evaluation.intervals import mean, proportion
from pipeline.evaluation.judge import judge_pairs
from pipeline.experiment import Judge
from tests.judge_server import Reply, Server, said

KEY = "sk-very-secret"


def longer(a: str, b: str) -> Reply:
    return said("A" if len(a) > len(b) else "B" if len(b) > len(a) else "C")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def ask(server: Server, tmp_path: Path) -> Callable[..., Any]:
    def ask(ours: list[str], theirs: list[str], **more: Any) -> Any:
        settings = Judge(base_url=server.url, model="judge-1", key_env="JUDGE_KEY")
        questions = [f"question {at}" for at in range(len(ours))]
        more = {"sleep": lambda seconds: None, **more}
        return judge_pairs(settings, questions, ours, theirs, cache=tmp_path / "cache", seed=3, **more)

    return ask


def test_wins_losses_and_ties_in_both_orders(server: Server, ask: Any) -> None:
    server.reply = longer
    judged = ask(["long one", "x", "abc", "same"], ["no", "longer", "xyz", "same"])
    assert (judged.wins, judged.losses, judged.ties, judged.failed) == (1, 1, 2, 0)
    assert judged.win_rate == mean([1.0, 0.0, 0.5, 0.5], seed=3)
    assert judged.decisive == proportion([True, False])
    # Equal answers are not asked about; the others are, in both orders.
    assert len(server.requests) == 6
    assert {one["path"] for one in server.requests} == {"/v1/chat/completions"}
    assert {one["model"] for one in server.requests} == {"judge-1"}
    assert {one["key"] for one in server.requests} == {f"Bearer {KEY}"}
    assert "question 0" in server.requests[0]["messages"][0]["content"]


def test_a_judge_that_always_prefers_the_first_decides_nothing(server: Server, ask: Any) -> None:
    server.reply = lambda a, b: said(" (a). ")
    judged = ask(["a", "b"], ["c", "d"])
    assert (judged.wins, judged.losses, judged.ties) == (0, 0, 2)
    assert judged.decisive is None


def test_asking_again_costs_nothing_and_the_key_is_written_nowhere(server: Server, ask: Any, tmp_path: Path) -> None:
    server.reply = longer
    first = ask(["long one", "x"], ["no", "longer"])
    asked = len(server.requests)
    assert ask(["long one", "x"], ["no", "longer"]) == first
    assert len(server.requests) == asked
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == asked
    assert not any(KEY in file.read_text() for file in files)
    for file in files:
        file.write_text("{")  # a damaged cache is asked anew
    assert ask(["long one", "x"], ["no", "longer"]) == first
    assert len(server.requests) == 2 * asked


def test_rate_limits_and_broken_replies_are_survived(server: Server, ask: Any) -> None:
    replies: list[Reply] = [
        (429, {"Retry-After": "7"}, {}), (503, {}, b"busy"), (200, {}, b"<html>"), (200, {}, {"choices": []})
    ]  # fmt: skip
    waited: list[float] = []
    server.reply = lambda a, b: replies.pop(0) if replies else longer(a, b)
    judged = ask(["long one"], ["no"], sleep=waited.append)
    assert (judged.wins, judged.failed) == (1, 0)
    assert waited == [7.0, 2.0, 4.0, 8.0]


def test_what_goes_on_failing_is_counted_and_left_out(server: Server, ask: Any) -> None:
    server.reply = lambda a, b: said("I would rather not say") if "odd" in a + b else longer(a, b)
    judged = ask(["long one", "odd"], ["no", "x"])
    assert (judged.wins, judged.failed) == (1, 1)
    assert judged.win_rate.n == 1


def test_an_endpoint_that_is_down_ends_it(server: Server, ask: Any) -> None:
    server.reply = lambda a, b: (500, {}, {})
    with pytest.raises(PipelineError, match="3 prompts in a row: HTTP 500"):
        ask(["a"] * 9, ["b"] * 9)
    assert len(server.requests) == 3 * 2 * 5


@pytest.mark.parametrize("status", [401, 404, 302])
def test_refusals_and_redirects(server: Server, ask: Any, status: int) -> None:
    server.reply = lambda a, b: (status, {"Location": "http://127.0.0.1:9/"}, {})
    with pytest.raises(PipelineError, match="judge cannot be used") as raised:
        ask(["a"] * 4, ["b"] * 4)
    assert KEY not in str(raised.value)
    assert {one["path"] for one in server.requests} == {"/v1/chat/completions"}


def test_no_key(server: Server, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(PipelineError, match="JUDGE_KEY is not set"):
        ask(["a"], ["b"])
    assert server.requests == []
