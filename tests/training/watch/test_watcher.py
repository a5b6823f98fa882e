from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.data.check import load_rows
from pipeline.data.tokenised import tokenize_preferences
from pipeline.evaluation.preference import pair_logps
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import adapter_sha256, attached
from pipeline.model.base import load_base
from pipeline.model.ground import prepare_ground
from pipeline.runs.run import Run, create_run, read_run
from pipeline.tracking import Mirrors
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft
from pipeline.training.watch.health import Finding
from pipeline.training.watch.history import Pairs, Sample, Setting
from pipeline.training.watch.watcher import GENERATIONS, PAIRS, Watcher


def experiment(write_experiment: Any, **changes: Any) -> Any:
    return load_experiment(write_experiment(**changes)).experiment


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_watching_leaves_the_training_as_it_is(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    """Evaluation at step 0 and sampled answers draw no random number that dropout or the order of rows would miss."""
    adapters = []
    for at, (samples, options) in enumerate([(4, {}), (0, {"eval_on_start": False})]):
        settings = {"max_steps": 4, "options": options}
        watched = experiment(write_experiment, sft=settings, tracking={"samples": samples})
        run = run_sft(watched, tmp_path / str(at), console).run
        assert (run / GENERATIONS).exists() is (samples > 0)
        adapters.append(adapter_sha256(run / "adapter"))
    assert adapters[0] == adapters[1]


def test_every_evaluation_of_a_dpo_run(write_experiment: Any, tmp_path: Path, console: Any) -> None:
    """Every two steps of five: at the start, twice between, and once at the end, which the interval does not hit. At
    step 0 the loss is ln 2 and every single margin 0; at the end the pairs are those of the saved adapters."""
    steps = [0, 2, 4, 5]
    asked = experiment(
        write_experiment,
        sft={"max_steps": 4},
        dpo={"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3},
        tracking={"samples": 2},
    )
    start = run_sft(asked, tmp_path / "runs", console).run
    run = run_dpo(asked, tmp_path / "runs", console).run
    evaluations = [line for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == steps
    first = evaluations[0]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)

    pairs = lines(run / PAIRS)
    assert [line["step"] for line in pairs] == steps
    assert pairs[0]["rewards/chosen"] == pytest.approx([0] * 4, abs=1e-6)
    rows = load_rows(Path(asked.data.preferences.eval), "preference")
    ground = prepare_ground(asked, lambda line: None)
    tokenised, _ = tokenize_preferences(ground.tokenizer, rows, asked.dpo.max_length)
    base = load_base(ground.files, asked.model, ground.placement)
    scores = []
    for folder in (run, start):
        with attached(base, folder / "adapter") as model:
            scores.append(torch.stack(pair_logps(model, tokenised)))
    rewards = asked.dpo.beta * (scores[0] - scores[1])
    assert pairs[-1]["rewards/chosen"] == pytest.approx(rewards[0].tolist(), abs=1e-4)
    assert pairs[-1]["rewards/rejected"] == pytest.approx(rewards[1].tolist(), abs=1e-4)
    assert len(set(pairs[-1]["rewards/rejected"])) == 4
    assert pairs[-1]["tokens/chosen"] == [len(pair.chosen_ids) for pair in tokenised]
    assert pairs[-1]["tokens/rejected"] == [len(pair.rejected_ids) for pair in tokenised]

    generated = lines(run / GENERATIONS)
    assert [line["step"] for line in generated] == [step for step in steps for _ in range(2)]
    assert generated[0]["prompt"] == "Which light is on? I see mint."
    assert all(line["tokens"] <= asked.evaluation.max_new_tokens for line in generated)
    assert isinstance(read_run(run).manifest["health"], list)


class Trainer:
    """What calls the callbacks, at a step of a run of 100."""

    args = SimpleNamespace(eval_on_start=True)

    def __init__(self, watcher: Watcher, step: int = 0) -> None:
        self.watcher = watcher
        self.state = SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)
        self.watcher.on_train_begin(self.args, self.state, None)

    def log(self, step: int, **logs: Any) -> None:
        self.state.global_step = step
        self.watcher.on_log(self.args, self.state, None, logs={"learning_rate": 1e-4, "grad_norm": 1.0, **logs})

    def evaluate(self, step: int) -> None:
        self.state.global_step = step
        self.watcher.on_evaluate(self.args, self.state, None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path, "lights", "dpo", "name: lights\n", {})


@pytest.fixture
def told() -> list[Finding]:
    return []


def watcher(run: Run, told: list[Finding], margin: float = 0.1) -> Watcher:
    def take(step: int) -> Pairs:
        return Pairs(step, [margin] * 2, [0.0] * 2, [5, 6], [7, 8])

    setting = Setting("dpo", learning_rate=1e-4, beta=0.1)
    return Watcher(run, Mirrors(), setting, take_pairs=take, ask=list, tell=told.append, say=print)


def test_pairs_that_cannot_be_told_are_said_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting("dpo", learning_rate=1e-4)
    trainer = Trainer(Watcher(run, Mirrors(), setting, take_pairs=lambda step: None, ask=list, tell=print, say=print))
    trainer.evaluate(1)
    trainer.evaluate(2)
    assert capsys.readouterr().out.count("single pairs are not recorded") == 1
    assert not (run.path / PAIRS).exists()


def test_a_healthy_run_has_an_empty_list(run: Run, told: list[Finding]) -> None:
    trainer = Trainer(watcher(run, told))
    trainer.log(1, loss=0.6)
    trainer.evaluate(1)
    assert read_run(run.path).manifest["health"] == []
    assert told == []


def test_a_finding_is_told_once_and_kept(run: Run, told: list[Finding]) -> None:
    """A loss of NaN is none in the record; margins of 4 in 5 tokens are 8 nats a token at beta 0.1."""
    trainer = Trainer(watcher(run, told, margin=4.0))
    trainer.evaluate(3)
    trainer.evaluate(6)
    trainer.log(7, loss=math.nan)
    trainer.log(8, loss=math.nan)
    assert [(finding.code, finding.step) for finding in told] == [("kl-bound", 3), ("not-finite", 7)]
    kept = read_run(run.path).manifest["health"]
    assert kept == [finding.as_dict() for finding in told]
    assert kept[0]["figure"] == pytest.approx(40 / 5.5)
    assert set(kept[0]) == {"code", "step", "figure", "message", "mend"}


def test_pairs_that_are_not_finite_are_kept_as_null_and_not_judged(run: Run, told: list[Finding]) -> None:
    trainer = Trainer(watcher(run, told, margin=math.nan))
    trainer.evaluate(3)
    assert lines(run.path / PAIRS)[0]["rewards/chosen"] == [None, None]
    assert told == []


def test_a_resumed_run_goes_on_where_its_checkpoint_was(run: Run, told: list[Finding]) -> None:
    """Nine lines are in the record and one follows: with ten, the chosen answers' fall is seen. What an interrupted
    process had found and kept behind the checkpoint is gone, and what it had found before is not told again."""
    before = Trainer(watcher(run, told, margin=4.0))
    for step in (3, 9, 12):
        before.evaluate(step)
    before.log(12, loss=math.nan)
    told.clear()
    record = [{"step": at, "loss": 0.5, "rewards/chosen": -0.2} for at in range(1, 10)]
    record += [{"step": step, "eval_loss": 0.5} for step in (3, 9)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in record))
    with (run.path / PAIRS).open("a") as stream:
        stream.write('{"step": 15, "rew')  # as a kill leaves it
    resumed = Trainer(watcher(read_run(run.path), told), step=9)
    assert resumed.args.eval_on_start is False
    assert [line["step"] for line in lines(run.path / PAIRS)] == [3, 9]
    assert [finding["code"] for finding in read_run(run.path).manifest["health"]] == ["kl-bound"]
    resumed.log(10, loss=0.5, **{"rewards/chosen": -0.2})
    assert [finding.code for finding in told] == ["likelihood-displacement"]


def test_an_evaluation_that_is_owed_is_not_kept_twice(run: Run, told: list[Finding]) -> None:
    """A checkpoint of step 9 owes its evaluation; a resumed run made it and was killed: the next one makes it again."""
    before = Trainer(watcher(run, told))
    for step in (3, 9):
        before.evaluate(step)
    run.metrics_file.write_text(json.dumps({"step": 3, "eval_loss": 0.5}) + "\n")
    resumed = Trainer(watcher(read_run(run.path), told), step=9)
    resumed.evaluate(9)
    assert [line["step"] for line in lines(run.path / PAIRS)] == [3, 9]


def test_samples_and_pairs_of_before_are_remembered(run: Run, told: list[Finding]) -> None:
    """Answers that ended before and do not now are a finding, also where the run was stopped in between."""

    def asking(ended: bool) -> Watcher:
        samples = [Sample("p", f"answer {at}", 5, ended) for at in range(4)]
        setting = Setting("dpo", learning_rate=1e-4, beta=0.1)
        return Watcher(run, Mirrors(), setting, take_pairs=None, ask=lambda: samples, tell=told.append, say=print)

    before = Trainer(asking(ended=True))
    before.evaluate(3)
    run.metrics_file.write_text(json.dumps({"step": 3, "eval_loss": 0.5}) + "\n")
    resumed = Trainer(asking(ended=False), step=3)
    resumed.evaluate(6)
    assert [finding.step for finding in told] == [6]
    assert "end" in told[0].message
