"""Runs in processes of their own, forked from one that has imported everything, so that they can be killed for real."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import LLAMA, config_of, save_model, splits_of

Hook = Callable[[], None]
KILLS = int(os.environ.get("FAULT_KILLS", "16"))
"""Seeded kills over SFT and DPO together; `scripts/faults` asks for more."""

_OPENED = {"last_blocks": 1, "final_norm": True, "lm_head": True, "learning_rate": 1.0e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "opened": {"unfreeze": _OPENED},
    "sparse-log": {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4},
    "padded": {},
    "stacked": {"adapter": "new"},
    "trunk": {"adapter": "frozen", "unfreeze": {"last_blocks": 1, "learning_rate": 1.0e-3}},
}
"""Each with dropout, saving in the middle of an epoch and evaluating.

SFT's batches have no padding but in `padded`; DPO's reference is always kept, and in `trunk` the frozen blocks' output.
"""
CELLS = [
    *(("sft", variant) for variant in ("plain", "padded", "accumulated", "opened", "sparse-log")),
    *(("dpo", variant) for variant in ("plain", "stacked", "trunk", "accumulated", "opened", "sparse-log")),
]
"""Stage and variant, wherever the variant makes a difference."""
BUILTIN = os.environ.get("FAULT_MODEL") == "builtin"
"""Whether the faults are those of the built-in model: few steps of it, one variant; `scripts/faults builtin`."""
if BUILTIN:
    CELLS = [("sft", "plain"), ("dpo", "plain")]
SHARE = -(-KILLS // len(CELLS))
"""Seeded kills of each cell."""


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
    pairs: bytes
    generations: bytes
    health: str


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
            theirs = {key: value for key, value in VARIANTS[variant].items() if stage == "dpo" or key != "adapter"}
            definition[stage] = {**definition[stage], **theirs}
        if variant == "trunk":
            definition["sft"] = {**definition["sft"], "unfreeze": {"last_blocks": 0}}
        for section, change in changes.items():
            definition[section] = {**definition.get(section, {}), **change} if isinstance(change, dict) else change
        path = self.folder / f"{variant}.yaml"
        path.write_text(json.dumps(definition), encoding="utf-8")
        return load_experiment(path).experiment

    def run(self, stage: str, variant: str, root: Path, *, hook: Hook | None = None, **settings: Any) -> Ended:
        """Runs a stage in a child; `hook` is called in it first."""
        experiment = self.experiment(variant, **settings.pop("changes", {}))
        hooks = [one for one in (keep_padding if variant == "padded" else None, hook) if one is not None]
        return in_child(lambda say: _stage(stage, experiment, root, say, hooks, settings))

    def command(self, *arguments: str, hook: Hook | None = None) -> Ended:
        """Runs `pipeline` with its arguments in a child; `said` is its stderr, `message` its stdout."""

        def work(console: Any) -> int:
            from pipeline.cli import main

            if hook is not None:
                hook()
            with redirect_stderr(console.file):
                return main(arguments)

        return in_child(work)

    def file(self, variant: str, **changes: Any) -> str:
        """The experiment's file, for a command."""
        self.experiment(variant, **changes)
        return str(self.folder / f"{variant}.yaml")

    def run_processes(
        self, stage: str, variant: str, root: Path, hooks: Sequence[Hook | None], **settings: Any
    ) -> list[Ended]:
        """Runs a stage in as many processes as there are hooks, as `torchrun` starts them."""
        experiment = self.experiment(variant, **settings.pop("changes", {}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(len(hooks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children = []
        for rank, hook in enumerate(hooks):

            def work(say: Any, hook: Hook | None = hook) -> None:
                _forget_one_process()
                _stage(stage, experiment, root, say, [] if hook is None else [hook], settings)

            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(hooks))}
            children.append(started(work, {**group, **numbers}))
        return [ended(*child) for child in children]

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
            assert self.run(stage, variant, root, hook=at_loop(lambda run: kill_at_call(None, counted))).code == 0
        return int(counted.read_text())

    def kill(self, stage: str, variant: str, root: Path, at: Sequence[int]) -> list[Path]:
        """Kills a new run at each of some calls.

        Its process prepares once. Where the training loop would begin, a fork of it trains for each of the kills, and
        what that one left is taken away before the next one begins, on the folder as it was. No two runs make quite the
        same number of calls: one that ends before its call does so again with an earlier one.

        Returns:
            A root for each of the kills, with what it left.
        """
        self.start(stage, variant, root / "run")
        roots = [root / str(number) for number in range(len(at))]

        def each(run: Path) -> None:
            before = root / "before"
            shutil.copytree(root / "run", before)
            for call, target in zip(at, roots, strict=True):
                status = 0
                while status == 0:
                    shutil.rmtree(target, ignore_errors=True)
                    child = os.fork()
                    if child == 0:
                        kill_at_call(call)
                        return
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    (root / "run").rename(target)
                    shutil.copytree(before, root / "run")
                    call = call * 99 // 100
                assert status == -signal.SIGKILL, f"{stage} {variant} at call {call}: {status}"
            os.kill(os.getpid(), signal.SIGKILL)

        ended = self.run(stage, variant, root / "run", hook=at_loop(each))
        assert ended.code == -signal.SIGKILL, ended
        return roots

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
    health = json.loads((run / "run.json").read_text())["health"]
    records = [run / name for name in ("metrics.jsonl", "pairs.jsonl", "generations.jsonl")]
    contents = [record.read_bytes() if record.exists() else b"" for record in records]
    return Left(hashlib.sha256(weights).hexdigest(), *contents, json.dumps(health))


def in_child(work: Callable[[Any], None]) -> Ended:
    """Does `work` in a forked process and waits for it."""
    return ended(*started(work))


def started(work: Callable[[Any], None], environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Does `work` in a forked process; returns its number, and where it will tell how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.environ.update(environment or {})
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
    return child, reader


def ended(child: int, reader: int) -> Ended:
    """Waits for a process of `started`."""
    with os.fdopen(reader) as stream:
        answer = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # One that was killed has not answered: what stands there is of a fork of it.
    heard = json.loads(answer) if answer and status >= 0 else {"said": "", "error": None, "message": ""}
    return Ended(status, **heard)


def _forget_one_process() -> None:
    """What an earlier test in this process has told Accelerate of being alone."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _answer(work: Callable[[Any], None], said: io.StringIO, answer: Any) -> int:
    from rich.console import Console

    from pipeline.errors import PipelineError

    console = Console(file=said, width=200, soft_wrap=True)
    code, error, message, printed = 0, None, "", io.StringIO()
    try:
        with redirect_stdout(printed):
            code = work(console) or 0
        message = printed.getvalue()
    except PipelineError as caught:
        code, error, message = int(caught.exit_code), caught.code, str(caught)
    except BaseException:
        code, message = 99, traceback.format_exc()
    json.dump({"said": said.getvalue(), "error": error, "message": message}, answer)
    return code


def _stage(stage: str, experiment: Any, root: Path, console: Any, hooks: list[Hook], settings: dict[str, Any]) -> None:
    from pipeline.training.dpo import run_dpo
    from pipeline.training.sft import run_sft

    for hook in hooks:
        hook()
    {"sft": run_sft, "dpo": run_dpo}[stage](experiment, root, console, **settings)


def keep_padding() -> None:
    """As with a model that needs padding: SFT's collator stays TRL's."""
    import pipeline.training.sft

    pipeline.training.sft.leave_padding_out = lambda *given, **more: "it is kept, for the test"


def at_loop(begin: Callable[[Path], None]) -> Hook:
    """A hook that calls `begin` with the run's folder where the training loop would begin."""

    def hook() -> None:
        from pipeline.training import stage

        train = stage.train

        def watched(trainer: Any, run: Any, *given: Any, **more: Any) -> Any:
            begin(run.path)
            return train(trainer, run, *given, **more)

        for module in ("sft", "dpo"):
            vars(sys.modules[f"pipeline.training.{module}"])["train"] = watched

    return hook


def kill_at_call(at: int | None, count: Path | None = None) -> None:
    """From here on, counts Python calls and kills the process at the `at`-th: any moment of a run, by its number.

    Args:
        at: from 0; None: nothing is killed.
        count: where to write how many calls there were.
    """
    from pipeline.runs.run import Run

    seen, stop = 0, Run.end.__code__

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        if event == "call":
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            if count is not None and frame.f_code is stop:
                count.write_text(str(seen))

    sys.setprofile(look)


@pytest.fixture(scope="session")
def small_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two blocks, half as wide: a fault costs a run or two."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = config_of("Llama", tiny_tokenizer, **{**LLAMA, **sizes, "num_hidden_layers": 2})
    return save_model(tmp_path_factory.mktemp("small-llama"), config, tiny_tokenizer)


@pytest.fixture(scope="session")
def arena(small_folder: Path, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
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
        "model": {"id": "builtin:smollm2-135m" if BUILTIN else str(small_folder), "device": "cpu"},
        "data": splits_of(tiny_data),
        "scope": {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
        "sft": {**rhythm, "learning_rate": 5.0e-2},
        "dpo": {**rhythm, "learning_rate": 5.0e-3},
        "evaluation": {"prompts": str(tiny_data["demonstrations-eval"]), "max_new_tokens": 3},
        "tracking": {"wandb": {"mode": "disabled"}, "samples": 2},
    }
    if BUILTIN:  # six steps
        short = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "eval_strategy": "no", "learning_rate": 1e-4}
        definition |= {"tracking": {"wandb": {"mode": "disabled"}, "samples": 0}}
        definition |= {stage: {**rhythm, **short} for stage in ("sft", "dpo")}
    # A child's garbage collections leave what was imported alone.
    gc.collect()
    gc.freeze()
    arena = Arena(tmp_path_factory.mktemp("faults"), definition)
    yield arena
    lines = [
        f"{fault}: {tried} tried, {tried - len(arena.lost.get(fault, []))} survived"
        for fault, tried in arena.tried.items()
    ]
    total, lost = sum(arena.tried.values()), sum(map(len, arena.lost.values()))
    print("\nfaults: " + "; ".join(lines))
    print(f"faults: {total} tried, {total - lost} survived, {lost} lost")
