"""What both stages share: the base and its tokenizer, the run's life, its account at the end."""

from __future__ import annotations

import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from pipeline.data.aside import SetAside, count_codes
from pipeline.data.check import CheckedRows, Report
from pipeline.data.tokenised import Counted
from pipeline.errors import ExitCode, PipelineError, PipelineErrors, comes_from
from pipeline.evaluation.questions import Question
from pipeline.experiment import Dpo, Experiment, Sft, Split, Unfreeze
from pipeline.experiment_file import dump_experiment, load_experiment
from pipeline.machine import machine_failure
from pipeline.model.base import require_bitsandbytes, template_sha256, tokenizer_sha256
from pipeline.model.device import Placement
from pipeline.model.ground import Ground, Say
from pipeline.model.precision import as_it_trains
from pipeline.model.scope import Trainable, is_opened
from pipeline.redaction import hide
from pipeline.runs.checkpoints import drop_newer
from pipeline.runs.files import sweep, write_atomically
from pipeline.runs.lock import locked
from pipeline.runs.provenance import provenance
from pipeline.runs.resume import COMPARED, Resumption, changes_since, require_unchanged
from pipeline.runs.run import Run, Stage, create_run, now, read_run
from pipeline.tracking import Mirrors, TensorBoard, start_tracker
from pipeline.training.callbacks import Guard, Recorder
from pipeline.training.keeper import Keeper
from pipeline.training.processes import Agreement, agree_on_run, is_first, require_processes
from pipeline.training.watch.evaluation import PairwiseEvaluation
from pipeline.training.watch.history import Setting
from pipeline.training.watch.samples import Sampler
from pipeline.training.watch.screen import Screen
from pipeline.training.watch.watcher import Watcher
from pipeline.trl_options import check_options

if TYPE_CHECKING:
    from pipeline.plan.fit import Budget

_S = TypeVar("_S", Sft, Dpo)
DRY_RUN_STEPS = 3
_BITSANDBYTES = re.compile(r"paged|bnb|^(adamw|ademamix|lion)_8bit$")
"""The optimizers of Transformers' `optim` that are bitsandbytes'."""


def require_options(stage: Stage, options: dict[str, Any]) -> None:
    """Checks a stage's `options` against the fields of TRL's configuration.

    Raises:
        PipelineErrors: every one that is unknown, of another type, or would break a promise.
    """
    problems = check_options(stage, options)
    if problems:
        raise PipelineErrors(problems)


def require_optimizer(stage: Stage, options: dict[str, Any], placement: Placement) -> None:
    """Checks that the optimizer that `options` name is to be had here.

    Raises:
        PipelineError: it is one of bitsandbytes, which is not installed, or needs a GPU that is not there.
    """
    optim, pointer = str(options.get("optim", "")), f"/{stage}/options/optim"
    if not _BITSANDBYTES.search(optim):
        return
    require_bitsandbytes(f"`optim: {optim}`", pointer)
    if "paged" in optim and placement.device.type != "cuda":
        raise PipelineError(
            f"`optim: {optim}` pages its state between GPU and CPU memory, and this runs on {placement.describe()}",
            code="conflict",
            pointer=pointer,
            mend="use `adamw_8bit`, or remove the line",
        )


def manifest_of(experiment: Experiment, ground: Ground, data: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What `run.json` holds from the start."""
    return {
        "name": experiment.name,
        "seed": experiment.seed,
        "base": {
            "id": ground.files.id,
            "revision": ground.files.revision,
            "sha256": ground.base_sha256,
            "trust_remote_code": experiment.model.trust_remote_code,
            "quantize": experiment.model.quantize,
        },
        "tokenizer": {
            "sha256": tokenizer_sha256(ground.tokenizer),
            "template_sha256": template_sha256(ground.tokenizer),
        },
        "device": ground.placement.describe(),
        "placement": {
            "device": ground.placement.device.type,
            "dtype": str(ground.placement.dtype).removeprefix("torch."),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        },
        "data": data,
        "metrics": {},
        **provenance(),
        **more,
    }


def split_files(split: Split) -> dict[str, str]:
    """The files that are given, by their use: `train`, and `eval` where there is one."""
    return {"train": split.train} if split.eval is None else {"train": split.train, "eval": split.eval}


def data_entry(report: Report, use: str, counted: Counted, set_aside: Sequence[SetAside]) -> dict[str, Any]:
    """One file of the manifest's `data`: what it is, what tokenising did to its rows, and how many are left out."""
    return {
        "path": report.file,
        "use": use,
        "kind": report.kind,
        "sha256": report.sha256,
        "rows": report.rows,
        "tokens": counted.as_dict(),
        "set_aside": {"rows": len(set_aside), "codes": count_codes(set_aside)},
    }


def places_of(rows: CheckedRows[Any], counted: Counted) -> list[str]:
    """Where the rows that tokenising left are: `file:line`, and the pointer in a JSON array."""
    left_out = {(one.line, one.pointer) for one in counted.set_aside}
    places = zip((row.line for row in rows), rows.pointers, strict=True)
    return [
        f"{counted.file}:{line}{pointer and ' ' + pointer}"
        for line, pointer in places
        if (line, pointer) not in left_out
    ]


def say_counts(say: Say, use: str, counted: Counted, set_aside: Sequence[SetAside]) -> None:
    """What tokenising did, in a line or a few; rows that are left out are never silent."""
    say(
        f"{use}: {counted.used:,} rows, {counted.tokens:,} tokens ({counted.loss_tokens:,} in the loss), "
        f"longest {counted.longest:,}"
    )
    for line in counted.describe():
        say(f"  {line}")
    if set_aside:
        why = ", ".join(f"{code} {count:,}" for code, count in count_codes(set_aside).items())
        say(f"  {len(set_aside):,} rows cannot be trained on: {why}")


def say_trainable(console: Console, trainable: Trainable, adapter_rate: float, unfreeze: Unfreeze) -> None:
    """The account of what trains, before the first step."""
    rates = {"adapter": adapter_rate, "opened": unfreeze.learning_rate}
    table = Table(title="trainable", title_justify="left", box=None, pad_edge=False)
    for heading in ("modules", "count"):
        table.add_column(heading, justify="right" if heading == "count" else "left")
    for module, count in trainable.modules.items():
        table.add_row(module, str(count))
    console.print(table)
    for kind, count in trainable.beyond_lora.items():
        console.print(f"without LoRA: {kind} ({count}), which no linear layer holds; it stays frozen", highlight=False)
    if trainable.unties_head:
        console.print("the head was tied to the embeddings; opened, it is a matrix of its own, here and in the adapter")
    for group, parameters in trainable.groups.items():
        console.print(f"{group}: {parameters:,} parameters at learning rate {rates[group]:g}", highlight=False)
    console.print(
        f"trainable params: {trainable.parameters:,} || all params: {trainable.all_parameters:,} || "
        f"trainable%: {trainable.percent:.4f}",
        highlight=False,
    )


def split_learning_rates(optimizer: Any, model: torch.nn.Module, opened_rate: float) -> Any:
    """Gives the opened weights parameter groups of their own, at their own learning rate, behind the others.

    The groups' other settings stay, so weight decay still spares norms and biases.
    """
    opened = {id(parameter) for name, parameter in model.named_parameters() if is_opened(name)}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    behind = []
    for group in groups:
        theirs = [parameter for parameter in group["params"] if id(parameter) in opened]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in opened]
        if group["params"]:
            optimizer.param_groups.append(group)
        if theirs:
            behind.append({**group, "params": theirs, "lr": opened_rate})
    optimizer.param_groups.extend(behind)
    return optimizer


@dataclass
class Outcome:
    """What a stage leaves; `as_dict` is its JSON."""

    run: Path | None
    """None for a dry run, which leaves none."""
    status: str
    metrics: dict[str, Any]
    trainable: Trainable
    more: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """`run`, `status`, `metrics` and more."""
        return {
            "run": None if self.run is None else str(self.run),
            "status": self.status,
            "metrics": self.metrics,
            **self.trainable.as_dict(),
            **self.more,
        }


@contextmanager
def begin(
    experiment: Experiment,
    stage: Stage,
    root: Path,
    manifest: dict[str, Any],
    say: Say,
    *,
    dry_run: bool,
    resumption: Resumption | None = None,
    budget: Budget | None = None,
) -> Iterator[tuple[Run, Mirrors]]:
    """A run folder, locked, and its trackers, all closed with the right status however the work inside ends.

    A dry run gets a folder that is gone afterwards, and no tracker.

    Raises:
        PipelineError: the folder cannot be written, a resumed run is not what it was, or what the work inside raised.
    """
    with tempfile.TemporaryDirectory() if dry_run else nullcontext(root) as where, ExitStack() as stack:
        if resumption is None:
            resolved = dump_experiment(experiment)
            run = agree_on_run(lambda: create_run(Path(where), experiment.name, stage, resolved, manifest))
        else:
            run = agree_on_run(lambda: resumption.run)
        if is_first():
            stack.enter_context(locked(run.path))
            if resumption is not None:
                _go_on(resumption, experiment, manifest, say)
        tracker = Mirrors()
        if is_first() and not dry_run:
            say(f"run: {run.path}")
            earlier = run.manifest.get("wandb")
            wandb = start_tracker(
                experiment.tracking.wandb,
                experiment=experiment.name,
                name=run.path.name,
                stage=stage,
                folder=run.path,
                config={"experiment": experiment.model_dump(mode="json"), "manifest": run.manifest},
                say=say,
                earlier=earlier,
                step=0 if resumption is None else resumption.checkpoint.step,
            )
            if earlier and earlier["id"] != wandb.id:
                run.update(wandb_earlier=[*run.manifest.get("wandb_earlier", []), earlier])
            run.update(wandb=wandb.describe())
            tensorboard = [TensorBoard(run.path / "tensorboard")] if experiment.tracking.tensorboard else []
            tracker = Mirrors(wandb, *tensorboard)
        try:
            with recorded(run, budget):
                yield run, tracker
        finally:
            tracker.finish(run.manifest)


def build_trainer(kind: type[Any], *, model: Any, **given: Any) -> Any:
    """TRL's trainer around a policy, whose weights keep their precision.

    Raises:
        PipelineError: TRL refuses the configuration for this model.
    """
    try:
        with as_it_trains(model):
            return kind(model=model, **given)
    except (ValueError, NotImplementedError) as error:
        if not any(comes_from(error, library) for library in ("trl", "transformers", "accelerate")):
            raise
        raise PipelineError(
            f"TRL refuses this configuration: {' '.join(str(error).split())[:400]}",
            code="refused-option",
            mend="change what the message names, under `options`",
        ) from error


def _go_on(resumption: Resumption, experiment: Experiment, manifest: dict[str, Any], say: Say) -> None:
    """Makes a stopped run a running one again, after looking at what has changed since."""
    run, checkpoint = resumption.run, resumption.checkpoint
    if read_run(run.path).manifest != run.manifest:
        raise PipelineError(
            f"another process has written to {run.name} meanwhile",
            code="run-locked",
            file=run.path,
            mend="look at it with `pipeline runs`, and start this again",
        )
    then = load_experiment(run.path / "experiment.yaml").experiment
    changes = changes_since(run, then, experiment, manifest)
    require_unchanged(run, changes, accepted=resumption.accept_changes)
    for change in changes:
        say(f"accepted: {change}")
    sweep(run.path)
    sweep(run.path / "state")
    drop_newer(run.path / "state", checkpoint.step)
    entry = {
        "at": now(),
        "step": checkpoint.step,
        "passed_over": dict(resumption.passed_over),
        "changes": [asdict(change) for change in changes],
        "argv": manifest["argv"],
    }
    run.update(
        status="running",
        end=None,
        error=None,
        resumed=[*run.manifest.get("resumed", []), entry],
        **{key: manifest[key] for key in COMPARED},
    )
    write_atomically(run.path / "experiment.yaml", dump_experiment(experiment))


def train(
    trainer: Any,
    run: Run,
    tracker: Mirrors,
    console: Console,
    unfreeze: Unfreeze,
    experiment: Experiment,
    questions: Sequence[Question],
    *,
    places: list[str],
    resumption: Resumption | None = None,
) -> dict[str, Any]:
    """Runs the trainer's loop under the guards, every logged step recorded, from a checkpoint if there is one.

    Args:
        trainer: one of the stages' own.
        run: its folder.
        tracker: where it is recorded besides.
        console: where progress is shown.
        unfreeze: what is opened, for its learning rate.
        experiment: what is asked for.
        questions: held-out prompts that are answered at each evaluation.
        places: where each row of the training data is; for a message.
        resumption: what is gone on with.

    Returns:
        The newest value of every metric.

    Raises:
        PipelineError: a figure is not finite, or the user interrupted.
    """
    from transformers import PrinterCallback

    require_processes(trainer)
    rate = trainer.args.learning_rate
    ratio = unfreeze.learning_rate / rate if unfreeze.opens else None
    if all(is_opened(name) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad):
        rate, ratio = unfreeze.learning_rate, 1.0  # the one rate that is logged is theirs
    guard, screen = Guard(), Screen(console, run.stage, ratio)
    recorder = Recorder(run.metrics_file, tracker, ratio)
    checkpoint = None if resumption is None else resumption.checkpoint
    if checkpoint is not None:
        if is_first():
            recorder.go_back(checkpoint.counters["metrics"])
        trainer.args.eval_on_start = False
    trainer.places = places
    trainer.keeper = Keeper(trainer, run, recorder, guard, console.print, checkpoint)
    sampler = Sampler(trainer, questions, experiment.evaluation.max_new_tokens, console.print)
    watcher = Watcher(
        run,
        tracker,
        _setting(trainer.args, run.stage, experiment, rate),
        take_pairs=trainer.take_pairs if isinstance(trainer, PairwiseEvaluation) else None,
        ask=sampler.ask,
        tell=screen.found,
        say=console.print,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in (Agreement(guard), guard, recorder, trainer.keeper, watcher, screen):
        trainer.add_callback(callback)
    try:
        with guard.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
    except KeyboardInterrupt:
        guard.interrupted = True
    finally:
        screen.close()
        run.update(metrics=recorder.last, micro_batches_cut_in=trainer.pieces, processes=trainer.args.world_size)
    if guard.failure is not None:
        raise guard.failure
    if guard.interrupted:
        saved = trainer.keeper.saved
        raise PipelineError(
            f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}, "
            + ("before the first checkpoint" if saved is None else f"with a checkpoint of step {saved}"),
            code="interrupted",
            file=run.path,
            mend="start it again" if saved is None else "the same command with --resume goes on from there",
            exit_code=ExitCode.INTERRUPTED,
        )
    return recorder.last


def _setting(args: Any, stage: str, experiment: Experiment, learning_rate: float) -> Setting:
    return Setting(
        stage,
        learning_rate,
        pairs_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        beta=experiment.dpo.beta,
        loss_scaling=args.fp16,
    )


def dry_run_of(stage: _S) -> _S:
    """The stage cut to a few steps, with no evaluation and no checkpoint."""
    return stage.model_copy(update={"max_steps": DRY_RUN_STEPS, "eval_strategy": "no", "save_strategy": "no"})


def longest(dataset: Any, stage: Sft | Dpo, length: Callable[[dict[str, Any]], int]) -> Any:
    """The rows that need the most memory, as many as the steps of a dry run take, the longest first."""
    count = DRY_RUN_STEPS * stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    lengths = [length(row) for row in dataset]
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    return dataset.select(order[:count])


def say_dry_run(console: Console, metrics: dict[str, Any], placement: Placement) -> dict[str, Any]:
    """What a dry run found out; also for its JSON."""
    peak = peak_memory(placement)
    console.print(
        f"dry run: {DRY_RUN_STEPS} steps on the longest rows, loss {metrics['loss']:.4f}, "
        f"peak memory {peak / 2**30:.2f} GiB; nothing is kept",
        highlight=False,
    )
    return {"dry_run": True, "peak_memory_bytes": peak}


@contextmanager
def recorded(run: Run, budget: Budget | None = None) -> Iterator[None]:
    """Whatever ends the work inside, the manifest says it: never a run that is left looking alive or finished.

    Args:
        run: whose manifest.
        budget: the plan's figures, for a machine whose memory does not suffice.

    Raises:
        PipelineError: in place of what the machine raised (memory, disk) and of an interruption.
    """
    try:
        yield
    except PipelineError as error:
        status = "interrupted" if error.exit_code is ExitCode.INTERRUPTED else "failed"
        run.end(status, error=error.as_dict())  # type: ignore[arg-type]
        raise
    except KeyboardInterrupt as error:
        stopped = PipelineError(
            "interrupted outside the training loop",
            code="interrupted",
            file=run.path,
            mend="the same command with --resume goes on if the run has a checkpoint; else start it again",
            exit_code=ExitCode.INTERRUPTED,
        )
        run.end("interrupted", error=stopped.as_dict())
        raise stopped from error
    except Exception as error:
        failure = machine_failure(error, "" if budget is None else budget.figures(error))
        described = (
            failure.as_dict() if failure else {"code": "internal", "message": hide(f"{type(error).__name__}: {error}")}
        )
        with suppress(OSError):  # a full disk: then the manifest goes on saying `running`
            run.end("failed", error=described)
        if failure is None:
            raise
        raise failure from error


def peak_memory(placement: Placement) -> int:
    """The most memory used so far, in bytes: the GPU's, or the process's on a CPU."""
    if placement.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(placement.device))
    try:  # what `getrusage` says on Linux counts the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
