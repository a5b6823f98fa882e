"""Phase one: supervised fine-tuning of a LoRA adapter with TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from pipeline.data.aside import write_set_aside
from pipeline.data.check import load_rows
from pipeline.data.tokenised import label_demonstrations, require_usable
from pipeline.errors import PipelineError
from pipeline.experiment import Experiment
from pipeline.model.adapter import hashes_of, save_adapter
from pipeline.model.base import load_base
from pipeline.model.ground import prepare_ground, quiet_libraries
from pipeline.model.policy import new_policy
from pipeline.model.scope import lora_config, trainable_of
from pipeline.plan.fit import Budget, settle_checkpointing, within_memory
from pipeline.plan.rhythm import demonstration_length
from pipeline.runs.resume import Resume, find_resumption
from pipeline.tracking import require_tracking
from pipeline.training.account import (
    Outcome,
    data_entry,
    manifest_of,
    places_of,
    say_counts,
    say_trainable,
    split_files,
)
from pipeline.training.arguments import require_optimizer, require_options, sft_config
from pipeline.training.dry_run import dry_run_of, longest, say_dry_run
from pipeline.training.engine.demonstrations import DemonstrationTrainer
from pipeline.training.engine.linear import join_products
from pipeline.training.engine.norms import join_norms
from pipeline.training.engine.padding_free import leave_padding_out
from pipeline.training.keeper import Resumable
from pipeline.training.processes import is_first, join_processes, wait_for_first
from pipeline.training.stage import begin, build_trainer, train
from pipeline.training.watch.evaluation import UnfeltEvaluation
from pipeline.training.watch.samples import sample_questions


class _Trainer(Resumable, UnfeltEvaluation, DemonstrationTrainer):
    """The engine's trainer, with checkpoints that it can be resumed from, and evaluations that it does not feel."""


def run_sft(
    experiment: Experiment, root: Path, console: Console, *, dry_run: bool = False, resume: Resume | None = None
) -> Outcome:
    """Trains the SFT adapter of an experiment and leaves a run folder.

    Args:
        experiment: with absolute paths.
        root: where runs live.
        console: where the user is told what goes on.
        dry_run: trains a few steps on the longest rows, and leaves nothing.
        resume: goes on with a run that was stopped.

    Raises:
        PipelineError: data, model or machine are not fit; a run that was begun says `failed` or `interrupted`.
    """
    with within_memory() as budget:
        return _run_sft(experiment, root, console, budget, dry_run=dry_run, resume=resume)


def _run_sft(
    experiment: Experiment, root: Path, console: Console, budget: Budget, *, dry_run: bool, resume: Resume | None
) -> Outcome:
    stage = experiment.sft
    split = experiment.data.demonstrations
    if split is None:
        raise PipelineError(
            "the experiment names no demonstrations to train on",
            code="missing-key",
            pointer="/data/demonstrations",
            mend="add `data: {demonstrations: {train: FILE}}`",
        )
    require_options("sft", stage.options)
    require_tracking(experiment.tracking)
    resumption = find_resumption(root, experiment.name, "sft", resume, console.print)
    aside = experiment.data.on_invalid == "set-aside"
    checked = {
        use: load_rows(Path(path), "demonstration", set_aside=aside, columns=split.map)
        for use, path in split_files(split).items()
    }
    questions = sample_questions(experiment, checked["eval"].rows if "eval" in checked else [])
    quiet_libraries()
    ground = prepare_ground(experiment, console.print)
    join_processes(ground.placement.device, console.print)
    require_optimizer("sft", stage.options, ground.placement)
    datasets, data, accounts, set_aside = {}, [], [], []
    places: list[str] = []
    for use, rows in checked.items():
        labelled, counted = label_demonstrations(ground.tokenizer, rows, stage.max_length)
        places = places_of(rows, counted) if use == "train" else places
        left_out = rows.set_aside + counted.set_aside
        say_counts(console.print, use, counted, left_out)
        datasets[use] = Dataset.from_list(labelled)
        data.append(data_entry(rows.report, use, counted, left_out))
        accounts.append(counted)
        set_aside += left_out
    require_usable(accounts, "sft", experiment.data.on_invalid)
    if dry_run:
        stage = dry_run_of(stage)
        datasets = {"train": longest(datasets["train"], stage, lambda row: len(row["input_ids"]))}
    stage = settle_checkpointing(
        stage,
        experiment,
        ground.files,
        ground.placement,
        [demonstration_length(row) for row in datasets["train"]],
        console.print,
        budget,
    )

    base = load_base(ground.files, experiment.model, ground.placement)
    unfreeze, pointer = experiment.unfreeze_of("sft")
    adapter_config = lora_config(base, experiment.scope.lora, unfreeze, ground.files.revision, pointer=pointer)
    set_seed(experiment.seed)  # the adapter starts at random
    policy = new_policy(base, adapter_config)
    manifest = manifest_of(experiment, ground, data, parent=None)
    with begin(
        experiment,
        "sft",
        root,
        manifest,
        console.print,
        placement=ground.placement,
        dry_run=dry_run,
        resumption=resumption,
        budget=budget,
    ) as (run, tracker, products):
        if is_first():
            write_set_aside(run.path, set_aside)
        trainer = build_trainer(
            _Trainer,
            model=policy,
            args=sft_config(
                stage,
                output=run.path / "state",
                seed=experiment.seed,
                placement=ground.placement,
                evaluates="eval" in datasets,
            ),
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=ground.tokenizer,
        )
        trainer.opened_learning_rate = unfreeze.learning_rate
        trainer.say = console.print
        join_products(trainer.model, rounds=products.round_gradients)
        join_norms(trainer.model)
        why_padded = leave_padding_out(trainer, rounds=products.round)
        if why_padded is not None:
            console.print(f"batches keep their padding: {why_padded}", highlight=False)
        trainable = trainable_of(trainer.model)
        say_trainable(console, trainable, stage.learning_rate, unfreeze)
        run.update(
            trainable=trainable.as_dict(),
            engine={"products": products.words, "padding_free": why_padded is None, "refusal": why_padded},
        )
        budget.doing = "training"
        metrics = train(
            trainer, run, tracker, console, unfreeze, experiment, questions, places=places, resumption=resumption
        )
        if dry_run:
            return Outcome(None, "finished", metrics, trainable, say_dry_run(console, metrics, ground.placement))
        if is_first():
            save_adapter(trainer.model, ground.tokenizer, run.adapter)
        wait_for_first()
        run.end("finished", adapter=hashes_of(run.adapter), files=run.files())
        return Outcome(run.path, run.status, metrics, trainable)
