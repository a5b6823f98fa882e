from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.experiment import Tracking, Wandb
from pipeline.experiment_file import load_experiment
from pipeline.runs.run import read_run
from pipeline.tracking import choose_mode, require_tracking, start_tracker
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft


def offline_records(run: Path) -> list[Any]:
    """Every record of W&B's own file of an offline run.

    The file is a 7-byte header and LevelDB's log format: blocks of 32 KiB, in each chunks of checksum (4 bytes),
    length (2), type (1: whole, 2: first, 3: middle, 4: last) and data; a record is the data of its chunks.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    records, at, data = [], 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no header is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        data = content[at + 7 : at + 7 + length] if kind in (1, 2) else data + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    def key(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    return [
        {key(item): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def no_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


def test_auto_is_online_only_with_a_key(no_netrc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "disabled"
    assert choose_mode("offline") == "offline"


def test_auto_reads_the_key_of_the_host_from_netrc(
    no_netrc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    netrc = tmp_path / "home/.netrc"
    netrc.write_text("machine wandb.example login user password " + "k" * 40 + "\n")
    netrc.chmod(0o600)
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert choose_mode("auto") == "online"


def test_offline_file_holds_every_logged_step_and_no_secret(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "CANARY" + "0123456789abcdef" * 2
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    tracking = {"wandb": {"mode": "offline"}, "tensorboard": True, "samples": 2}
    path = write_experiment(tracking=tracking, sft={"max_steps": 3}, dpo={"max_steps": 4})
    experiment = load_experiment(path).experiment
    sft = run_sft(experiment, tmp_path / "runs", console).run
    run = run_dpo(experiment, tmp_path / "runs", console).run
    assert "W&B" not in console.file.getvalue()  # nothing went wrong there
    records = offline_records(run)
    logged = history(records)
    margins = {line["_step"]: line["rewards/margins"] for line in logged if "rewards/margins" in line}
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(margins) == [1, 2, 3, 4]
    assert margins == {line["step"]: line["rewards/margins"] for line in written if "rewards/margins" in line}
    (started,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (started.project, started.run_group, started.job_type) == ("lights", "lights", "dpo")
    (before,) = [record.run for record in offline_records(sft) if record.WhichOneof("record_type") == "run"][:1]
    assert (before.run_group, before.job_type) == ("lights", "sft")
    assert_evaluations_are_there(run, logged)
    assert_tensorboard_says_the_same(run)
    configured = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert configured["experiment"]["dpo"]["beta"] == 0.1
    assert configured["manifest"]["parent"] == "lights/sft-001"
    last = [record.config for record in records if record.WhichOneof("record_type") == "config"][-1]
    manifest = {item.key: json.loads(item.value_json) for item in last.update}["manifest"]
    assert manifest["status"] == "finished"
    assert manifest["reference"]["drift"] == 0.0
    described = read_run(run).manifest["wandb"]
    assert (described["mode"], described["group"]) == ("offline", "lights")
    for file in (tmp_path / "runs").rglob("*"):
        if file.is_file():
            assert canary.encode() not in file.read_bytes(), file


def assert_evaluations_are_there(run: Path, logged: list[dict[str, Any]]) -> None:
    """At the start, after an epoch and at the end: figures, the pairs' margins, the sampled answers."""
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["_step"]: line for line in logged if "eval_loss" in line}
    assert {step: line["eval_rewards/margins"] for step, line in evaluated.items()} == {
        line["step"]: line["eval_rewards/margins"] for line in written if "eval_loss" in line
    }
    assert sorted(evaluated) == [0, 3, 4]
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    for line, rows in zip(evaluated.values(), pairs, strict=True):
        margins = [c - r for c, r in zip(rows["rewards/chosen"], rows["rewards/rejected"], strict=True)]
        assert (line["eval_margins/_type"], sum(line["eval_margins/values"])) == ("histogram", len(margins))
        bins = line["eval_margins/bins"]
        assert bins[0] <= min(margins) + 1e-9
        assert max(margins) - 1e-9 <= bins[-1]
    generated = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    (folder,) = run.glob("wandb/offline-run-*/files")
    table = json.loads((folder / evaluated[4]["samples/path"]).read_text())
    assert table["columns"] == ["step", "prompt", "answer", "tokens", "ended"]
    assert table["data"] == [list(row.values()) for row in generated if row["step"] == 4]


def assert_tensorboard_says_the_same(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})  # 0: all of them
    events.Reload()
    tags = events.Tags()
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "rewards/margins", "eval_loss", "eval_rewards/accuracies", "learning_rate"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in written if name in line
        ]
    assert [event.step for event in events.Histograms("eval_margins")] == [0, 3, 4]
    assert "samples/text_summary" in tags["tensors"]


def test_tensorboard_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tracking(Tracking(tensorboard=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_tracking(Tracking())
    with pytest.raises(PipelineError) as caught:
        require_tracking(Tracking(tensorboard=True))
    assert (caught.value.code, caught.value.pointer) == ("missing-package", "/tracking/tensorboard")
    assert "pip install tensorboard" in caught.value.mend


def test_a_tracker_that_cannot_start_leaves_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**arguments: Any) -> Any:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    said: list[str] = []
    tracker = start_tracker(
        Wandb(mode="online"), experiment="e", name="sft-001", stage="sft", folder=tmp_path, config={}, say=said.append
    )
    tracker.log(1, {"loss": 1.0})
    tracker.finish({"status": "finished"})
    assert tracker.describe() is None
    assert len(said) == 2
    assert "tracked offline" in said[0]
    assert "metrics.jsonl holds everything" in said[1]


def test_a_tracker_that_breaks_midway_is_said_once(tmp_path: Path) -> None:
    from pipeline.tracking import Tracker

    class Broken:
        id = "x"

        def log(self, metrics: Any, step: int) -> None:
            raise ConnectionError

    said: list[str] = []
    tracker = Tracker(Broken(), said.append)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.finish({"status": "finished"})
    assert len(said) == 1
