"""Runs in processes of their own, forked from one that has imported everything, so that they can be killed for real."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Hook = Callable[[], None]
KILLS = int(os.environ.get("FAULT_KILLS", "16"))
"""Seeded kills over SFT and DPO together; `scripts/faults` asks for more."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "opened": {"unfreeze": {"last_blocks": 1, "final_norm": True, "lm_head": True, "learning_rate": 1.0e-3}},
    "sparse-log": {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4},
}
"""Each in both stages, with dropout, saving in the middle of an epoch and evaluating."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    said: str
    error: str | None
    """Code of the PipelineError."""
    message: str


@dataclass(frozen=True)
class Left:
    """What a finished run must share with one that was never stopped."""

    adapter: str
    metrics: bytes


@dataclass
class Arena:
    """Starts stages of one experiment in forked processes and keeps the account of what was done to them."""

    folder: Path
    definition: dict[str, Any]
    kills: int = KILLS
    references: dict[tuple[str, str], Left] = field(default_factory=dict)
    tried: dict[str, int] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)

    def experiment(self, variant: str, **changes: Any) -> Any:
        from pipeline.experiment_file import load_experiment

        definition = {**self.definition, "name": variant}
        for stage in ("sft", "dpo"):
            definition[stage] = {**definition[stage], **VARIANTS[variant]}
        for section, change in changes.items():
            definition[section] = {**definition[section], **change} if isinstance(change, dict) else change
        path = self.folder / f"{variant}.yaml"
        path.write_text(json.dumps(definition), encoding="utf-8")
        return load_experiment(path).experiment

    def run(self, stage: str, variant: str, root: Path, *, hook: Hook | None = None, **settings: Any) -> Ended:
        """Runs a stage in a child; `hook` is called in it first."""
        experiment = self.experiment(variant, **settings.pop("changes", {}))
        return in_child(lambda say: _stage(stage, experiment, root, say, hook, settings))

    def start(self, stage: str, variant: str, root: Path) -> Path:
        """A root in which `stage` can begin: for DPO, with the SFT run that it starts from."""
        if stage == "dpo":
            shutil.copytree(self.folder / "sft" / variant, root / variant)
        return root

    def reference(self, stage: str, variant: str) -> Left:
        """What the run leaves when nothing happens to it."""
        if (stage, variant) not in self.references:
            if stage == "dpo":
                self.reference("sft", variant)
            root = self.start(stage, variant, self.folder / stage)
            ended = self.run(stage, variant, root)
            assert ended.code == 0, ended
            self.references[stage, variant] = left(root / variant / f"{stage}-001")
        return self.references[stage, variant]

    def calls(self, stage: str, variant: str) -> int:
        """Python calls from the beginning of the training loop to the end of the run."""
        counted = self.folder / f"calls-{stage}-{variant}"
        if not counted.exists():
            self.reference(stage, variant)
            root = self.start(stage, variant, self.folder / f"counted-{stage}")
            assert self.run(stage, variant, root, hook=kill_at_call(None, counted)).code == 0
        return int(counted.read_text())

    def kill(self, stage: str, variant: str, root: Path, at: int) -> Ended:
        """Kills a new run at one of its calls."""
        return self.run(stage, variant, self.start(stage, variant, root), hook=kill_at_call(at))

    def resume(self, stage: str, variant: str, root: Path, **settings: Any) -> Ended:
        """Resumes what was killed; starts again what was killed before its first checkpoint."""
        from pipeline.runs.resume import Resume

        ended = self.run(stage, variant, root, resume=Resume(), **settings)
        return self.run(stage, variant, root) if ended.error == "no-checkpoint" else ended

    def outcome(self, stage: str, variant: str, root: Path) -> Left | None:
        """What the newest run left, if it finished."""
        newest = max((root / variant).glob(f"{stage}-*"))
        return left(newest) if json.loads((newest / "run.json").read_text())["status"] == "finished" else None

    def judge(self, fault: str, what: str, survived: bool) -> None:
        """Notes whether a fault was survived; the account is printed at the end.

        Raises:
            AssertionError: it was not.
        """
        self.tried[fault] = self.tried.get(fault, 0) + 1
        if not survived:
            self.lost.setdefault(fault, []).append(what)
        assert survived, f"lost: {fault}: {what}"


def left(run: Path) -> Left:
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    return Left(hashlib.sha256(weights).hexdigest(), (run / "metrics.jsonl").read_bytes())


def in_child(work: Callable[[Any], None]) -> Ended:
    """Does `work` in a forked process and waits for it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = io.StringIO()
        code = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with os.fdopen(writer, "w") as answer:
                code = _answer(work, said, answer)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    heard = json.loads(answer) if answer else {"said": "", "error": None, "message": ""}
    return Ended(status, **heard)


def _answer(work: Callable[[Any], None], said: io.StringIO, answer: Any) -> int:
    from rich.console import Console

    from pipeline.errors import PipelineError

    console = Console(file=said, width=200, soft_wrap=True)
    code, error, message = 0, None, ""
    try:
        work(console)
    except PipelineError as caught:
        code, error, message = int(caught.exit_code), caught.code, str(caught)
    except BaseException:
        code, message = 99, traceback.format_exc()
    json.dump({"said": said.getvalue(), "error": error, "message": message}, answer)
    return code


def _stage(stage: str, experiment: Any, root: Path, console: Any, hook: Hook | None, settings: dict[str, Any]) -> None:
    from pipeline.training.dpo import run_dpo
    from pipeline.training.sft import run_sft

    if hook is not None:
        hook()
    {"sft": run_sft, "dpo": run_dpo}[stage](experiment, root, console, **settings)


def kill_at_call(at: int | None, count: Path | None = None) -> Hook:
    """Kills the process at the `at`-th Python call since the training loop began: any moment of a run, by its number.

    Args:
        at: from 0; None: nothing is killed.
        count: where to write how many calls there were.
    """

    def hook() -> None:
        from pipeline.training import stage

        train, seen = stage.train, 0

        def look(frame: Any, event: str, argument: Any) -> None:
            nonlocal seen
            if event == "call":
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                if frame.f_code is stop and count is not None:
                    count.write_text(str(seen))

        def watched(*given: Any, **more: Any) -> Any:
            sys.setprofile(look)
            return train(*given, **more)

        for module in ("sft", "dpo"):
            vars(sys.modules[f"pipeline.training.{module}"])["train"] = watched

    from pipeline.runs.run import Run

    stop = Run.end.__code__
    return hook


@pytest.fixture(scope="session")
def arena(tiny_folder: Path, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    import torch

    import pipeline.training.dpo
    import pipeline.training.sft  # noqa: F401 - imported once, here, for every child

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    rhythm = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,  # 12 rows: three steps an epoch
        "max_length": 128,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    definition = {
        "seed": 3,
        "model": {"id": str(tiny_folder), "device": "cpu"},
        "data": {
            "demonstrations": {
                "train": str(tiny_data["demonstrations"]),
                "eval": str(tiny_data["demonstrations-eval"]),
            },
            "preferences": {"train": str(tiny_data["preferences"]), "eval": str(tiny_data["preferences-eval"])},
        },
        "scope": {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
        "sft": {**rhythm, "learning_rate": 5.0e-2},
        "dpo": {**rhythm, "learning_rate": 5.0e-3},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    arena = Arena(tmp_path_factory.mktemp("faults"), definition)
    yield arena
    lines = [
        f"{fault}: {tried} tried, {tried - len(arena.lost.get(fault, []))} survived"
        for fault, tried in arena.tried.items()
    ]
    total, lost = sum(arena.tried.values()), sum(map(len, arena.lost.values()))
    print("\nfaults: " + "; ".join(lines))
    print(f"faults: {total} tried, {total - lost} survived, {lost} lost")
