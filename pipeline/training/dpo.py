"""Phase two: DPO with TRL's DPOTrainer, the SFT adapter both the policy's start and the frozen reference."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from transformers import set_seed

from pipeline import cache
from pipeline.data.aside import write_set_aside
from pipeline.data.check import load_rows
from pipeline.data.tokenised import require_usable, tokenize_preferences
from pipeline.data.tokens import Pair
from pipeline.errors import PipelineError
from pipeline.evaluation.preference import pair_logps
from pipeline.experiment import Experiment
from pipeline.model.adapter import attached, hashes_of, read_config, require_adapter, save_adapter
from pipeline.model.base import load_base, template_sha256
from pipeline.model.builtin import cache_directory
from pipeline.model.device import give_memory_back
from pipeline.model.ground import prepare_ground, quiet_libraries
from pipeline.model.policy import open_policy, require_stackable
from pipeline.model.scope import trainable_of
from pipeline.plan.fit import Budget, settle_checkpointing, within_memory
from pipeline.plan.rhythm import pair_length
from pipeline.runs.resume import Resume, Resumption, find_resumption
from pipeline.runs.run import Run, newest_finished
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
from pipeline.training.arguments import dpo_config, require_optimizer, require_options
from pipeline.training.dry_run import dry_run_of, longest, say_dry_run
from pipeline.training.engine.linear import join_products
from pipeline.training.engine.norms import join_norms
from pipeline.training.engine.precision import multiplication
from pipeline.training.engine.reference import KeptReference, ReferenceStore, keep_evaluated, reference_key
from pipeline.training.engine.trainer import PreferenceTrainer
from pipeline.training.keeper import Resumable
from pipeline.training.processes import is_first, join_processes, wait_for_first
from pipeline.training.proof import (
    PROOF_PAIRS,
    check_drift,
    check_evaluation,
    check_movement,
    check_saved,
    check_start,
    evaluated_sample,
    fingerprints,
    reference_hash,
    score,
    write_proof,
)
from pipeline.training.stage import begin, build_trainer, train
from pipeline.training.start import find_adapter, require_same_ground
from pipeline.training.tolerance import tolerance_for
from pipeline.training.watch.evaluation import PairwiseEvaluation
from pipeline.training.watch.samples import sample_questions


@dataclass(frozen=True)
class Start:
    """The adapter that DPO starts from."""

    name: str
    """`<experiment>/sft-001`, the folder of a run that lies elsewhere, or of a foreign adapter."""
    folder: Path
    hashes: dict[str, str]
    """`sha256` of its weights and `config_sha256` of its configuration."""


def find_start(experiment: Experiment, root: Path, start: str | None) -> tuple[Start, Run | None]:
    """The adapter that `--from` names, or that of the newest finished SFT run.

    Raises:
        PipelineError: there is none, its run did not finish, or it changed since its run.
    """
    if start is None:
        found: Run | Path = newest_finished(root, experiment.name, "sft")
    else:
        name, found = find_adapter(root, start)
    if isinstance(found, Path):
        return Start(name, found, hashes_of(require_adapter(found))), None
    if found.status != "finished":
        raise PipelineError(
            f"{found.name} is {found.status}, so it left no adapter to start from",
            code="no-finished-run",
            file=found.path,
            mend="name a finished run",
        )
    hashes = hashes_of(require_adapter(found.adapter))
    changed = [name for name, value in hashes.items() if found.manifest["adapter"].get(name, value) != value]
    if changed:
        what = {"sha256": "weights", "config_sha256": "configuration (adapter_config.json)"}[changed[0]]
        raise PipelineError(
            f"the adapter of {found.name} is not the one that its run wrote: the SHA-256 of its {what} differs from "
            "run.json",
            code="adapter-changed",
            file=found.adapter,
            mend="train SFT again; or name the folder `adapter` itself with --from to take it as it is",
        )
    # A run of another folder of runs is found again by its path alone.
    here = (root / found.name).resolve() == found.path.resolve()
    return Start(found.name if here else str(found.path.resolve()), found.adapter, hashes), found


def _same_start(resumption: Resumption, experiment: Experiment, root: Path) -> tuple[Start, Run | None]:
    """The adapter that a run was started with: it is the reference, whatever has been trained since.

    Raises:
        PipelineError: it is gone, or no longer what it was.
    """
    manifest = resumption.run.manifest
    origin, sft_run = find_start(experiment, root, manifest["parent"])
    if any(manifest["reference"][f"adapter_{name}"] != value for name, value in origin.hashes.items()):
        raise PipelineError(
            f"the adapter that {resumption.run.name} was started with has changed, and it is the reference",
            code="adapter-changed",
            file=origin.folder,
            mend="put it back, or start a new run",
        )
    return origin, sft_run


class _Trainer(Resumable, PairwiseEvaluation, PreferenceTrainer):
    """The engine's trainer, saved and resumed by the keeper, its evaluation kept pair by pair."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.write_reference()  # a resumed run has to find what this one has scored
        super()._save_checkpoint(model, trial)


def run_dpo(
    experiment: Experiment,
    root: Path,
    console: Console,
    *,
    start: str | None = None,
    dry_run: bool = False,
    resume: Resume | None = None,
) -> Outcome:
    """Trains DPO on an SFT adapter and leaves a run folder with the proof that the reference did not move.

    Args:
        experiment: with absolute paths.
        root: where runs live.
        console: where the user is told what goes on.
        start: a run or an adapter folder; None: the newest finished SFT run of the experiment.
        dry_run: trains a few steps on the longest pairs, and leaves nothing.
        resume: goes on with a run that was stopped, on the SFT adapter that it was started with.

    Raises:
        PipelineError: data, start, model or machine are not fit, step 0 does not read ln 2 and margin 0, or the
            reference moved; a run that was begun says `failed` or `interrupted`.
    """
    with within_memory() as budget:
        return _run_dpo(experiment, root, console, budget, start=start, dry_run=dry_run, resume=resume)


def _run_dpo(
    experiment: Experiment,
    root: Path,
    console: Console,
    budget: Budget,
    *,
    start: str | None,
    dry_run: bool,
    resume: Resume | None,
) -> Outcome:
    stage = experiment.dpo
    split = experiment.data.preferences
    if split is None:
        raise PipelineError(
            "the experiment names no preferences to train on",
            code="missing-key",
            pointer="/data/preferences",
            mend="add `data: {preferences: {train: FILE}}`",
        )
    require_options("dpo", stage.options)
    require_tracking(experiment.tracking)
    resumption = find_resumption(root, experiment.name, "dpo", resume, console.print)
    if resumption is None:
        origin, sft_run = find_start(experiment, root, start)
    else:
        origin, sft_run = _same_start(resumption, experiment, root)
    require_stackable(read_config(origin.folder), origin.folder, stage.adapter)
    console.print(f"start and reference: {origin.name}")
    aside = experiment.data.on_invalid == "set-aside"
    checked = {
        use: load_rows(Path(path), "preference", set_aside=aside, columns=split.map)
        for use, path in split_files(split).items()
    }
    questions = sample_questions(experiment, checked["eval"].rows if "eval" in checked else [])
    quiet_libraries()
    ground = prepare_ground(experiment, console.print)
    join_processes(ground.placement.device, console.print)
    require_optimizer("dpo", stage.options, ground.placement)
    require_same_ground(origin.name, origin.folder, sft_run, ground, experiment.model.quantize, console.print)
    pairs, data, accounts, set_aside = {}, [], [], []
    places: list[str] = []
    for use, rows in checked.items():
        pairs[use], counted = tokenize_preferences(ground.tokenizer, rows, stage.max_length)
        places = places_of(rows, counted) if use == "train" else places
        left_out = rows.set_aside + counted.set_aside
        say_counts(console.print, use, counted, left_out)
        data.append(data_entry(rows.report, use, counted, left_out))
        accounts.append(counted)
        set_aside += left_out
    require_usable(accounts, "dpo", experiment.data.on_invalid)
    proof_pairs = pairs["train"][:PROOF_PAIRS]
    datasets = {use: Dataset.from_list([pair._asdict() for pair in some]) for use, some in pairs.items()}
    if dry_run:
        stage = dry_run_of(stage)
        datasets = {"train": longest(datasets["train"], stage, _pair_length)}
    stage = settle_checkpointing(
        stage,
        experiment,
        ground.files,
        ground.placement,
        [pair_length(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in datasets["train"]],
        console.print,
        budget,
    )

    base = load_base(ground.files, experiment.model, ground.placement)
    unfreeze, pointer = experiment.unfreeze_of("dpo")
    with multiplication(experiment.engine.precision, ground.placement.device):
        reopened = _reopened(base, origin.folder, proof_pairs)
    set_seed(experiment.seed)  # a new adapter starts at random
    policy = open_policy(
        base, origin.folder, unfreeze, adapter=stage.adapter, lora=experiment.scope.lora, pointer=pointer
    )
    named = reference_hash(ground.base_sha256, origin.hashes, template_sha256(ground.tokenizer))
    manifest = manifest_of(
        experiment,
        ground,
        data,
        parent=origin.name,
        reference={"hash": named, **{f"adapter_{name}": value for name, value in origin.hashes.items()}},
    )
    with begin(
        experiment,
        "dpo",
        root,
        manifest,
        console.print,
        placement=ground.placement,
        dry_run=dry_run,
        resumption=resumption,
        budget=budget,
    ) as (run, tracker, products):
        tolerance = tolerance_for(ground.placement.dtype, experiment.model.quantize, rounds=products.round)
        if is_first():
            write_set_aside(run.path, set_aside)
        trainable = trainable_of(policy)
        say_trainable(console, trainable, stage.learning_rate, unfreeze)
        run.update(trainable=trainable.as_dict())
        trainer = build_trainer(
            _Trainer,
            model=policy,
            args=dpo_config(
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
        size = stage.per_device_train_batch_size
        batches = [
            trainer.data_collator([pair._asdict() for pair in proof_pairs[at : at + size]])
            for at in range(0, len(proof_pairs), size)
        ]
        few = trainer.trial_batch()
        refusal = trainer.share_prompts(few, rounds=tolerance.drift > 0)
        if refusal is None:
            console.print("each prompt is computed once for both completions")
        else:
            console.print(f"prompts are computed twice, as TRL does: {refusal}")
        run.update(engine={"products": products.words, "shared_prompt": refusal is None, "refusal": refusal})
        join_products(policy, rounds=products.round_gradients)
        join_norms(policy)
        before = score(trainer, batches)
        check_start(before, reopened, tolerance, beta=stage.beta, plain_sigmoid=_is_plain_sigmoid(trainer))
        trainer.begins_as_reference = torch.equal(before.policy, before.reference)
        console.print(
            f"step 0: loss {before.loss:.6f}, margin {before.metrics['rewards/margins']:.6f}; the reference is the "
            f"SFT adapter ({float((before.reference - reopened).abs().max()):.1e} nats apart)",
            highlight=False,
        )
        words, trunk = trainer.keep_trunk(experiment.engine.trunk_cache, few, cache_directory())
        if words is not None:
            console.print(words, highlight=False)
        key_of = partial(
            reference_key,
            base_sha256=ground.base_sha256,
            placement=ground.placement,
            quantize=experiment.model.quantize,
            products=products,
            attention=policy.get_base_model().config._attn_implementation,
            ld_alpha=trainer.ld_alpha,
        )
        key = key_of(adapter=origin.hashes)
        store = ReferenceStore(cache.folder_of("references"), key)
        kept = KeptReference(store, tolerance.start, console.print)
        trainer.keep_reference(kept)
        run.update(engine={**run.manifest["engine"], "trunk": trunk})
        trained_names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        weights = fingerprints(policy)
        budget.doing = "training"
        metrics = train(
            trainer, run, tracker, console, unfreeze, experiment, questions, places=places, resumption=resumption
        )
        kept.write()
        run.update(engine={**run.manifest["engine"], "reference": {**kept.account(), "key": key}})
        trainer.drop_trunk()
        after = score(trainer, batches)
        reference = {
            **manifest["reference"],
            "drift": check_drift(before.reference, after.reference, tolerance),
            "pairs": len(proof_pairs),
            "start_loss": before.loss,
            "unmoved": check_movement(weights, fingerprints(policy), trained_names),
        }
        if dry_run:
            found = say_dry_run(console, metrics, ground.placement)
            return Outcome(None, "finished", metrics, trainable, {"reference": reference, **found})
        if is_first():
            save_adapter(policy, ground.tokenizer, run.adapter)
        wait_for_first()
        evaluated = _evaluated_last(trainer)
        # The trained model makes room: what was saved is judged on a base that this run never touched.
        del trainer, policy, base
        give_memory_back()
        fresh = load_base(ground.files, experiment.model, ground.placement)
        _require_unchanged(origin)  # what was reopened at the start is what would be reopened now
        saved = _reopened(fresh, run.adapter, proof_pairs)
        reference["saved"] = check_saved(saved, reopened, after, tolerance, stage.beta)
        if is_first():
            write_proof(run.path, proof_pairs, saved, reopened)
        if evaluated is not None:
            asked = [pairs["eval"][at] for at in evaluated_sample(len(pairs["eval"]))]
            held_out, before_dpo = (
                _reopened(fresh, folder, asked, share_prompts=True) for folder in (run.adapter, origin.folder)
            )
            reference["evaluation"] = check_evaluation(
                held_out,
                before_dpo,
                *evaluated,
                beta=stage.beta,
                batch_size=stage.per_device_eval_batch_size,
                tolerance=tolerance,
            )
            if is_first():
                trained = ReferenceStore(cache.folder_of("references"), key_of(adapter=hashes_of(run.adapter)))
                with suppress(OSError, SafetensorError):  # `compare` scores them, then
                    held_out_rows = [pair._asdict() for pair in pairs["eval"]]
                    keep_evaluated(trained, store.read(), held_out_rows, evaluated[0], stage.beta)
            console.print(
                f"proof: rewards of {len(asked)} held-out pairs from the saved folders are those evaluated last "
                f"({reference['evaluation']['apart']:.1e} apart)",
                highlight=False,
            )
        console.print(
            f"proof: reference drift {reference['drift']:g} nats, frozen weights unchanged, "
            f"{len(trained_names) - len(reference['unmoved'])} of {len(trained_names)} trained tensors moved, "
            f"the saved adapter is the trained policy ({reference['saved']['policy']:.1e} nats apart)",
            highlight=False,
        )
        run.end("finished", adapter=hashes_of(run.adapter), files=run.files(), reference=reference)
        return Outcome(run.path, run.status, metrics, trainable, {"reference": reference})


def _reopened(base: Any, folder: Path, pairs: list[Pair], *, share_prompts: bool = False) -> torch.Tensor:
    """Log-probabilities of `pairs` under the adapter in `folder`, `[N, 2]` nats."""
    with attached(base, folder) as model:
        return torch.stack(pair_logps(model, pairs, share_prompts=share_prompts), dim=1)


def _require_unchanged(start: Start) -> None:
    if hashes_of(require_adapter(start.folder)) != start.hashes:
        raise PipelineError(
            f"the adapter that this run started with has changed since, so its proof cannot be repeated: {start.name}",
            code="adapter-changed",
            file=start.folder,
            mend="train DPO again, and leave the folder of its start alone meanwhile",
        )


def _evaluated_last(trainer: _Trainer) -> tuple[torch.Tensor, dict[str, float]] | None:
    """Rewards `[N, 2]` of an evaluation after the last step, and what was logged of it; None where there is none.

    LD-DPO weighs the tokens of a log-probability; several processes, or a last batch left out, make other means.
    """
    logs = [logs for logs in trainer.state.log_history if "eval_rewards/margins" in logs]
    args = trainer.args
    if not logs or logs[-1]["step"] != trainer.state.global_step:
        return None
    if trainer.ld_alpha is not None or args.world_size > 1 or args.dataloader_drop_last:
        return None
    rewards = trainer.last_pairs
    if rewards is None:
        return None
    return torch.tensor([rewards.chosen_rewards, rewards.rejected_rewards]).T, dict(logs[-1])


def _pair_length(row: dict[str, Any]) -> int:
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _is_plain_sigmoid(trainer: PreferenceTrainer) -> bool:
    """Whether the loss at margin 0 is ln 2: nothing is added to the sigmoid loss, and nothing weighs it."""
    plain = trainer.loss_types == ["sigmoid"] and trainer.loss_weights == [1.0]
    return plain and not trainer.aux_loss_enabled and not trainer.use_weighting
