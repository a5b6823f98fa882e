"""Canaries for keys and tokens: what a user has in the environment, or hands over by mistake, is written nowhere.

Stages, comparison, judge, report, W&B (offline) and provoked failures run in this process; then every file that was
written, what was printed, every traceback and the command lines of this process and its children are searched.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from pipeline import tracking
from pipeline.cli import main
from tests.judge_server import Server, said

CANARIES = {
    "WANDB_API_KEY": "c0ffee00" * 5,  # as long as W&B's
    "HF_TOKEN": "hf_CanaryOfTheHub0000000000000",
    "JUDGE_KEY": "sk-canary-of-the-judge",
}
HANDED_OVER = "canaryHandedOver"
"""What a user types after --set, in place after place."""
SHORT = {"max_steps": 1, "warmup_steps": 0}


class CommandLines(threading.Thread):
    """Collects the command lines and the names of this process and its children while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    self.seen.add(" ".join([process.name(), *process.cmdline()]))
                except psutil.Error:
                    continue


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def search(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the canaries, and a home of its own; called with more text, it says where any of them turned up."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        folder = tmp_path / "home" / name.lower()
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.chdir(tmp_path)
    # On a busy machine W&B's process may take longer to begin than a run would wait; here it is to be looked at.
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    for bound in ("_INIT_TIMEOUT", "_START_TIMEOUT", "_FINISH_TIMEOUT"):
        monkeypatch.setattr(tracking, bound, 300.0)
    wandb.teardown()  # its process keeps the folder and the environment that it was started in
    watcher = CommandLines()
    watcher.start()

    def found(*more: str) -> list[str]:
        captured = capfd.readouterr()
        texts = {"stdout": captured.out, "stderr": captured.err, "command lines": "\n".join(watcher.seen)}
        texts |= {f"text {at}": text for at, text in enumerate(more)}
        places = {name: text.encode() for name, text in texts.items()}
        places |= {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        secrets = [*CANARIES.values(), HANDED_OVER]
        return [name for name, content in places.items() if any(secret.encode() in content for secret in secrets)]

    yield found
    watcher.done.set()
    watcher.join()


def test_a_run_with_everything_on_writes_no_secret(
    search: Callable[..., list[str]], server: Server, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    server.reply = lambda a, b: said("A")
    path = write_experiment(
        sft=SHORT,
        dpo=SHORT,
        evaluation={"judge": {"base_url": server.url, "model": "m", "key_env": "JUDGE_KEY"}},
        tracking={"wandb": {"mode": "offline"}},
    )
    assert main(["align", str(path), "--set", "sft.learning_rate=1e-3"]) == 0
    assert server.requests[0]["key"] == f"Bearer {CANARIES['JUDGE_KEY']}"  # it was in use
    run = tmp_path / "checkpoints/lights/dpo-001"
    for written in ("run.json", "compare.json", "report.html", "metrics.jsonl", "wandb"):
        assert (run / written).exists(), written
    assert list(run.rglob("*.wandb"))
    assert search() == []


@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
def test_a_command_that_fails_says_no_secret(
    search: Callable[..., list[str]],
    server: Server,
    write_experiment: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    debug: bool,
) -> None:
    """Wrong places for a key, a library that puts one into its exception, a judge that answers with it."""
    from pipeline.evaluation.judge import judge_pairs
    from pipeline.experiment import Judge
    from pipeline.training import sft

    path, texts = str(write_experiment(sft=SHORT)), []

    def run(*arguments: str) -> None:
        try:
            assert main([*arguments, *(["--debug"] if debug else [])]) != 0
        except Exception:
            texts.append(traceback.format_exc())

    for setting in (
        f"evaluation.judge.api_key={HANDED_OVER}",
        f"evaluation.judge={{base_url: 'http://me:{HANDED_OVER}@host/v1', model: m}}",
        f"evaluation.judge={{base_url: 'http://host/v1?api_key={HANDED_OVER}', model: m}}",
        f"evaluation.judge={{base_url: 'http://host/v1', model: m, key_env: {HANDED_OVER}}}",
        f"sft.options.hub_token={HANDED_OVER}",
        f"tracking.wandb.api_key={HANDED_OVER}",
    ):
        run("sft", path, "--set", setting)
        run("sft", path, "--set", setting, "--format", "json")

    def leaky(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"401 for token {CANARIES['HF_TOKEN']}")

    # Before there is a run, and in one, whose manifest says how it ended. With --debug the traceback of another
    # library's exception is shown as that library words it.
    for place in () if debug else ("load_base", "build_trainer"):
        with monkeypatch.context() as patched:
            patched.setattr(sft, place, leaky)
            run("sft", path)
    for manifest in Path("checkpoints").glob("*/*/run.json"):
        assert "401 for token ***" in manifest.read_text()
    assert debug or list(Path("checkpoints").glob("*/*/run.json"))
    for reply in ((401, {}, b"no such key"), said(f"your key {CANARIES['JUDGE_KEY']}")):
        monkeypatch.setenv("JUDGE_KEY", CANARIES["JUDGE_KEY"])
        server.reply = lambda a, b, reply=reply: reply
        settings = Judge(base_url=server.url, model="m", key_env="JUDGE_KEY")
        with pytest.raises(Exception) as caught:
            judge_pairs(settings, ["q"] * 3, ["a"] * 3, ["b"] * 3, cache=Path("judged"), seed=0, sleep=time.sleep)
        texts.append("".join(traceback.format_exception(caught.value)))
    assert len(texts) >= 2
    assert search(*texts) == []
