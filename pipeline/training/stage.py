"""The life of a run: begun, trained, gone on with, and ended as what it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.errors import ExitCode, PipelineError, comes_from
from pipeline.evaluation.questions import Question
from pipeline.experiment import Experiment, Unfreeze
from pipeline.experiment_file import dump_experiment, load_experiment
from pipeline.machine import machine_failure
from pipeline.model.device import Placement
from pipeline.model.ground import Say
from pipeline.model.precision import as_it_trains
from pipeline.model.scope import is_opened
from pipeline.redaction import hide
from pipeline.runs.checkpoints import drop_newer
from pipeline.runs.files import sweep, write_atomically
from pipeline.runs.lock import locked
from pipeline.runs.resume import COMPARED, Resumption, changes_since, require_unchanged
from pipeline.runs.run import Run, Stage, create_run, now, read_run
from pipeline.tracking import Mirrors, TensorBoard, start_tracker
from pipeline.training.callbacks import Guard, Recorder
from pipeline.training.engine.head import compact_head
from pipeline.training.engine.precision import Products, multiplication
from pipeline.training.keeper import Keeper
from pipeline.training.processes import Agreement, agree_on_run, is_first, require_processes
from pipeline.training.watch.evaluation import PairwiseEvaluation
from pipeline.training.watch.history import Setting
from pipeline.training.watch.samples import Sampler
from pipeline.training.watch.screen import Screen
from pipeline.training.watch.watcher import Watcher

if TYPE_CHECKING:
    from pipeline.plan.fit import Budget


@contextmanager
def begin(
    experiment: Experiment,
    stage: Stage,
    root: Path,
    manifest: dict[str, Any],
    say: Say,
    *,
    placement: Placement,
    dry_run: bool,
    resumption: Resumption | None = None,
    budget: Budget | None = None,
) -> Iterator[tuple[Run, Mirrors, Products]]:
    """A run folder, locked, and its trackers, all closed with the right status however the work inside ends.

    While it is open, the head scores what counts, and products are made as the experiment has it.

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
            with (
                recorded(run, budget),
                multiplication(experiment.engine.precision, placement.device) as products,
                compact_head(placement.device, rounds=products.round_gradients),
            ):
                say(products.words)
                yield run, tracker, products
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
