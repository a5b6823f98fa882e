from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import tracking
from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Tracking, Wandb
from pipeline.experiment_file import dump_experiment, load_experiment
from pipeline.runs.resume import Resume
from pipeline.runs.run import create_run, read_run
from pipeline.tracking import choose_mode, require_tracking, start_tracker
from pipeline.training import sft as sft_module
from pipeline.training.dpo import run_dpo
from pipeline.training.sft import run_sft
from pipeline.wandb_sync import sync


def offline_records(run: Path) -> list[Any]:
    """Every record of W&B's own file of an offline run.

    The file is a 7-byte header and LevelDB's log format: blocks of 32 KiB, in each chunks of checksum (4 bytes),
    length (2), type (1: whole, 2: first, 3: middle, 4: last) and data; a record is the data of its chunks.
    """
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return records_in(file)


def records_in(file: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

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
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with no key in it, and a W&B that has read no settings yet."""
    import wandb

    home = tmp_path / "home"
    home.mkdir()
    for name in [*os.environ, "NETRC"]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield home
    wandb.teardown()


def test_auto_is_online_only_with_a_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "disabled"
    assert choose_mode("offline") == "offline"


KEY = "k" * 40
OWN = {"WANDB_BASE_URL": "https://wandb.example:8080"}


@pytest.mark.parametrize(
    ("file", "content", "environment", "mode"),
    [
        (".netrc", f"machine api.wandb.ai login user password {KEY}", {}, "online"),
        (".netrc", f"machine api.forge.coreweave.com login user password {KEY}", {}, "online"),  # `wandb login` of 0.31
        (".netrc", f"machine wandb.example:8080 login user password {KEY}", {}, "offline"),
        (".netrc", f"machine wandb.example:8080 login user password {KEY}", OWN, "online"),
        (".netrc", f"machine wandb.example login user password {KEY}", OWN, "offline"),
        (".netrc", f"machine api.wandb.ai login user password {KEY}", OWN, "offline"),
        (".netrc", f"default login user password {KEY}", OWN, "online"),
        (".netrc", "machine api.wandb.ai login user password short", {}, "online"),  # `wandb.init` says so
        (".netrc", "machine", {}, "offline"),
        ("_netrc", f"machine api.wandb.ai login user password {KEY}", {}, "online"),
        ("elsewhere", f"machine api.wandb.ai login user password {KEY}", {"NETRC": "~/elsewhere"}, "online"),
        (".config/wandb/settings", f"[default]\napi_key = {KEY}", {}, "online"),
        (".config/wandb/settings", "[default]\nmode = disabled", {"WANDB_API_KEY": KEY}, "disabled"),
        (".config/wandb/settings", "[default]\nmode = offline", {"WANDB_API_KEY": KEY}, "offline"),
        (".config/wandb/settings", "[default]\nmode = offline", {"WANDB_MODE": "online"}, "online"),
        ("token", "a token", {"WANDB_IDENTITY_TOKEN_FILE": "~/token"}, "online"),
        ("nothing", "", {"WANDB_API_KEY": "short"}, "online"),
        ("nothing", "", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": KEY}, "offline"),
    ],
)
def test_auto_looks_where_wandb_looks(
    home: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str, environment: dict[str, str], mode: str
) -> None:
    path = home / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n")
    path.chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode("auto") == mode


def test_another_wandb_is_asked_by_its_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.lib import wbauth

    monkeypatch.delattr(wbauth, "authenticate_session")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
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
        raise RuntimeError(f"no service takes {KEY}")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
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
    assert "no service takes ***" in said[1]


def test_a_killed_process_of_wandb_does_not_end_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb.teardown` leaves Python with the status of its process: -9 where that was killed."""
    import sys

    import wandb

    from pipeline.tracking import _end_service

    left: list[object] = []

    def leave(code: int) -> None:
        left.append(code)
        sys.exit(-9)

    monkeypatch.setattr(wandb, "teardown", leave)
    _end_service()
    assert left == [1]


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
    assert "pipeline wandb-sync RUN" in said[0]


class Slow:
    """A W&B run that does not answer until it is told to."""

    id = "x"

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.logged: list[int] = []

    def log(self, metrics: Any, step: int) -> None:
        self.answer.wait(60)
        self.logged.append(step)


@pytest.mark.parametrize(("calls", "why"), [(2, "did not answer within 0 s"), (10, "does not keep up")])
def test_nobody_waits_for_a_service_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, calls: int, why: str) -> None:
    """Every call would block for ever: training goes on, and the end waits for the stated time only."""
    ended: list[bool] = []
    monkeypatch.setattr(tracking, "_FINISH_TIMEOUT", 0.01)
    monkeypatch.setattr(tracking, "_WAITING", 3)
    monkeypatch.setattr(tracking, "_end_service", lambda: ended.append(True))
    said: list[str] = []
    slow = Slow()
    before = time.monotonic()
    tracker = tracking.Tracker(slow, said.append)
    for step in range(calls):
        tracker.log(step, {"loss": 1.0})
    assert tracker.gave_up is (calls == 10)  # more than may wait
    tracker.finish({"status": "finished"})
    assert time.monotonic() - before < 10
    assert len(said) == 1
    assert why in said[0]
    assert (ended, tracker.gave_up) == ([True], True)
    slow.answer.set()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_service_that_is_stopped_or_killed_ends_neither_the_run_nor_its_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    """W&B's own process, for real; no traceback is left on the way out."""
    script = (
        "import psutil, sys\n"
        "from pathlib import Path\n"
        "from pipeline import tracking\n"
        "from pipeline.experiment import Wandb\n"
        "tracking._FINISH_TIMEOUT = 1.0\n"
        "tracker = tracking.start_tracker(Wandb(mode='offline'), experiment='e', name='sft-001', stage='sft',\n"
        "    folder=Path(sys.argv[1]), config={}, say=print)\n"
        "for child in psutil.Process().children():\n"
        f"    child.send_signal({int(number)})\n"
        "for step in range(5000):\n"
        "    tracker.log(step, {'loss': 1.0, 'text': 'x' * 1000})\n"
        "tracker.finish({'status': 'finished'})\n"
        "print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "alive"
    assert "pipeline wandb-sync RUN" in done.stdout


@pytest.mark.parametrize("key", [KEY, "short"], ids=["silent", "wrong-key"])
def test_a_service_that_does_not_answer_holds_up_the_start_for_a_while_only(
    home: Path, tmp_path: Path, key: str
) -> None:
    """A port where somebody listens and says nothing; W&B's own patience is a minute and a half."""
    script = (
        "import socket, sys, time\n"
        "from pathlib import Path\n"
        "from pipeline import tracking\n"
        "from pipeline.experiment import Wandb\n"
        "tracking._INIT_TIMEOUT = tracking._FINISH_TIMEOUT = 1.0\n"
        "before = time.monotonic()\n"
        "tracker = tracking.start_tracker(Wandb(), experiment='e', name='sft-001', stage='sft',\n"
        "    folder=Path(sys.argv[1]), config={}, say=print)\n"
        "assert time.monotonic() - before < 30, time.monotonic() - before\n"
        "assert tracker.describe()['mode'] == 'offline'\n"
        "tracker.finish({'status': 'finished'})\n"
    )
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        there = {"WANDB_API_KEY": key, "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **there},
        )
    assert done.returncode == 0, done.stderr
    assert "the run is tracked offline" in done.stdout


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_process_of_wandb_that_was_stopped_before_does_not_hold_up_the_start(
    home: Path, tmp_path: Path, mode: str
) -> None:
    """It is there since an earlier stage; `wandb.init` waits for it without an end."""
    script = (
        "import psutil, signal, sys, time\n"
        "from pathlib import Path\n"
        "import wandb\n"
        "from pipeline import tracking\n"
        "from pipeline.experiment import Wandb\n"
        "tracking._START_TIMEOUT = 3.0\n"
        "wandb.setup()\n"
        "(child,) = psutil.Process().children()\n"
        "child.send_signal(signal.SIGSTOP)\n"
        "before = time.monotonic()\n"
        "try:\n"
        "    tracker = tracking.start_tracker(Wandb(mode=sys.argv[2]), experiment='e', name='sft-001', stage='sft',\n"
        "        folder=Path(sys.argv[1]), config={}, say=print)\n"
        "    tracker.finish({'status': 'finished'})\n"
        "    assert time.monotonic() - before < 30, time.monotonic() - before\n"
        "finally:\n"
        "    if child.is_running():\n"
        "        child.kill()\n"
    )
    nowhere = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    with (tmp_path / "said").open("w+") as said:  # no pipe, whose end a stopped process would keep open
        command = [sys.executable, "-c", script, str(tmp_path), mode]
        assert subprocess.run(command, stdout=said, stderr=said, timeout=120, env=nowhere).returncode == 0
    assert "TimeoutError" in (tmp_path / "said").read_text()


class Taking:
    """What `wandb.init` gives, as far as it is used here."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.id = arguments["id"] or "new"
        self.project, self.group = arguments["project"], arguments["group"]
        self.settings = SimpleNamespace(mode=arguments["mode"])
        self.config = SimpleNamespace(update=lambda *given, **more: None)
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Taking]:
    import wandb

    runs: list[Taking] = []

    def init(**arguments: Any) -> Taking:
        runs.append(Taking(**arguments))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    return runs


@pytest.mark.parametrize(("mode", "continued"), [("online", "old"), ("offline", None)])
def test_a_resumed_run_keeps_its_id_where_it_can_be_continued(
    tmp_path: Path, taken: list[Taking], mode: str, continued: str | None
) -> None:
    settings = {"experiment": "e", "name": "sft-001", "stage": "sft", "folder": tmp_path, "config": {}, "say": print}
    earlier = {"id": "old", "mode": mode, "project": "e", "group": "e"}
    tracking.start_tracker(Wandb(mode="online"), earlier=earlier, step=5, **settings)
    assert taken[0].arguments["id"] == continued
    assert taken[0].arguments["resume"] == ("allow" if continued else None)
    assert taken[0].group == "e"
    said = {"resumed_from": {"id": "old", "step": 5}}
    assert (taken[0].arguments["config"], taken[0].arguments["tags"]) == (
        ({}, None) if continued else (said, ["resumed"])
    )


def test_an_offline_run_that_is_resumed_says_what_it_goes_on_with(
    write_experiment: Any, tmp_path: Path, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own files: a second run of the same name and group, from the step behind the checkpoint on."""
    path = write_experiment(tracking={"wandb": {"mode": "offline"}, "samples": 0}, sft={"max_steps": 4})
    experiment = load_experiment(path).experiment
    with monkeypatch.context() as patched:
        training_step = sft_module._Trainer.training_step

        def stopped(self: Any, *rest: Any, **more: Any) -> Any:
            if self.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return training_step(self, *rest, **more)

        patched.setattr(sft_module._Trainer, "training_step", stopped)
        with pytest.raises(PipelineError) as caught:
            run_sft(experiment, tmp_path / "runs", console)
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    folder = tmp_path / "runs/lights/sft-001"
    (first,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    before = read_run(folder).manifest["wandb"]
    run_sft(experiment, tmp_path / "runs", console, resume=Resume())
    (second,) = set(folder.glob("wandb/offline-run-*/run-*.wandb")) - {first}
    parts = [records_in(file) for file in (first, second)]
    started = [next(one.run for one in part if one.WhichOneof("record_type") == "run") for part in parts]
    assert [(one.display_name, one.run_group, list(one.tags)) for one in started] == [
        ("sft-001", "lights", []),
        ("sft-001", "lights", ["resumed"]),
    ]
    configured = {item.key: json.loads(item.value_json) for item in started[1].config.update}
    assert configured["resumed_from"] == {"id": started[0].run_id, "step": 2}
    steps = [[line["_step"] for line in history(part) if "loss" in line] for part in parts]
    assert steps == [[1, 2], [3, 4]]
    manifest = read_run(folder).manifest
    assert (manifest["wandb"]["id"], manifest["wandb_earlier"]) == (started[1].run_id, [before])


def test_sync_sends_the_record_under_a_new_id_in_the_same_group(
    write_experiment: Any, tmp_path: Path, taken: list[Taking]
) -> None:
    experiment = load_experiment(write_experiment()).experiment
    run = create_run(tmp_path / "runs", "lights", "sft", dump_experiment(experiment), {"wandb": {"id": "old"}})
    with pytest.raises(PipelineError, match="logged nothing"):
        sync(run, experiment, print)
    run.metrics_file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    run.end("finished")
    said: list[str] = []
    sync(run, experiment, said.append)
    assert taken[0].logged == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert (taken[0].arguments["group"], taken[0].arguments["mode"], taken[0].ended) == ("lights", "online", 0)
    manifest = read_run(run.path).manifest
    assert (manifest["wandb"]["id"], manifest["wandb_earlier"]) == ("new", [{"id": "old"}])
    assert said == ["sent: 2 lines as lights/new, group lights"]


def test_the_command_sends_a_record_or_says_why_not(
    write_experiment: Any, tmp_path: Path, taken: list[Taking], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from pipeline.cli import main

    experiment = load_experiment(write_experiment()).experiment
    run = create_run(tmp_path / "runs", "lights", "sft", dump_experiment(experiment), {"wandb": {"id": "old"}})
    run.metrics_file.write_text('{"step": 1, "loss": 0.5}\n')
    run.end("finished")
    command = ["wandb-sync", "lights/sft-001", "--checkpoints", str(tmp_path / "runs"), "--format", "json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["run"], answer["wandb"]["id"], answer["wandb"]["group"]) == (str(run.path), "new", "lights")
    assert taken[0].logged == [(1, {"loss": 0.5})]

    def refuse(**arguments: Any) -> Any:
        raise wandb.errors.AuthenticationError("no such key")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main(command) == 4
    assert json.loads(capsys.readouterr().out)["errors"][0]["code"] == "not-sent"
    assert main([*command[:1], "lights/sft-002", *command[2:]]) == 2


def test_sync_says_what_was_not_taken(write_experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**arguments: Any) -> Any:
        raise wandb.errors.AuthenticationError("no such key")

    monkeypatch.setattr(wandb, "init", refuse)
    experiment = load_experiment(write_experiment()).experiment
    run = create_run(tmp_path / "runs", "lights", "sft", dump_experiment(experiment), {"wandb": {"id": "old"}})
    run.metrics_file.write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(PipelineError) as caught:
        sync(run, experiment, lambda line: None)
    assert caught.value.code == "not-sent"
    assert read_run(run.path).manifest["wandb"] == {"id": "old"}
