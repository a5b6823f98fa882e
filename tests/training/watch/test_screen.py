from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline.training.watch import screen as screen_module
from pipeline.training.watch.health import Finding
from pipeline.training.watch.screen import Screen, memory_in_use

ARGS = SimpleNamespace(device=torch.device("cpu"))


FINDING = Finding("gradient-spike", 3, 20.0, "the norm jumped to 20", "try `[sigmoid, sft]`")


class Clock:
    """Ten seconds a step."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def trained(console: Console, steps: int = 4, evaluate: bool = True, first: int = 0, logged: bool = True) -> Screen:
    """A run of `steps` steps of ten seconds and a thousand tokens, evaluated for 40 seconds before and after."""
    clock = Clock()
    shown = Screen(console, "dpo", 0.1, clock)
    state = SimpleNamespace(global_step=first, max_steps=steps)

    def evaluation() -> None:
        shown.on_prediction_step(ARGS, state, None)
        clock.now += 40
        shown.on_log(ARGS, state, None, logs={"eval_loss": 0.6, "eval_rewards/margins": 0.25})
        assert shown._status.doing == "evaluating"
        shown.on_evaluate(ARGS, state, None)

    shown.on_train_begin(ARGS, state, None)
    if evaluate:
        evaluation()
    for at in range(first + 1, steps + 1):
        shown.on_step_begin(ARGS, state, None)
        clock.now += 10
        state.global_step = at
        shown.on_step_end(ARGS, state, SimpleNamespace(should_log=logged))
        logs = {"loss": 0.7 - 0.1 * at, "rewards/margins": 0.1 * at, "learning_rate": 2e-5, "num_tokens": 1000.0 * at}
        if logged:
            shown.on_log(ARGS, state, None, logs=logs)
    if evaluate:
        evaluation()
    return shown


def test_the_panel_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "memory_in_use", lambda device: 2**30)
    console = terminal()
    shown = trained(console)
    shown.found(FINDING)
    shown.close()
    last = console.file.getvalue().rpartition("╭")[2]  # type: ignore[attr-defined]
    for words in (
        "dpo",
        "step 4/4",
        "0:02:00",  # of 40 + 40 seconds of evaluation and 40 of steps
        "loss      0.3000  eval   0.6000  █▆▃▁",
        "margin    0.4000  eval   0.2500  ▁▃▆█",
        "100 tokens/s  memory 1.00 GiB  adapter lr 2.00e-05  opened lr 2.00e-06",
        "health: gradient-spike",
    ):
        assert words in last, words
    assert "evaluating" not in last


def test_a_finding_is_told_with_its_mend_as_it_is(console: Any) -> None:
    Screen(console, "dpo", None).found(FINDING)
    assert console.file.getvalue() == (
        "health: gradient-spike at step 3: the norm jumped to 20\n  try `[sigmoid, sft]`\n"
    )


def test_a_finding_is_cut_at_words_on_a_terminal() -> None:
    console = terminal(30)
    Screen(console, "dpo", None).found(FINDING)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in lines] == [
        "health: gradient-spike at step", "3: the norm jumped to 20", "  try `[sigmoid, sft]`"
    ]  # fmt: skip


def test_closing_twice_or_before_the_beginning_is_fine() -> None:
    Screen(terminal(), "sft", None).close()
    shown = trained(terminal())
    shown.close()
    shown.close()


def test_lines_where_there_is_no_terminal(console: Any) -> None:
    """One for each evaluation, and one after 15 seconds and more, so at the second step, and at the last."""
    trained(console)
    assert console.file.getvalue().splitlines() == [
        "dpo step 0/4  evaluated: loss 0.600  margin 0.250",
        "dpo step 2/4  loss 0.500  margin 0.200  20 s left",
        "dpo step 4/4  loss 0.300  margin 0.400  0 s left",
        "dpo step 4/4  evaluated: loss 0.600  margin 0.250",
    ]


def test_a_step_that_is_not_logged_has_a_line_without_figures(console: Any) -> None:
    trained(console, evaluate=False, logged=False)
    assert console.file.getvalue().splitlines() == ["dpo step 2/4  20 s left", "dpo step 4/4  0 s left"]


def test_time_left_of_a_resumed_run_counts_its_own_steps(console: Any) -> None:
    """From step 2 of 5: ten seconds each, and one to go at the second line."""
    trained(console, steps=5, evaluate=False, first=2, logged=False)
    assert console.file.getvalue().splitlines() == ["dpo step 4/5  10 s left", "dpo step 5/5  0 s left"]


def test_memory_of_this_process() -> None:
    """A tensor of 64 MiB is seen."""
    before = memory_in_use(torch.device("cpu"))
    held = torch.ones(16 * 2**20)
    assert memory_in_use(torch.device("cpu")) - before >= 60 * 2**20
    del held


@pytest.mark.parametrize("width", [30, 60])
def test_a_narrow_terminal(width: int) -> None:
    console = terminal(width)
    trained(console).close()
    lines = console.file.getvalue().rpartition("╭")[2].splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in lines)
