"""What the records of a run say, in words: what was asked, its data, its proof, what it was made with."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.experiment import Dpo, Experiment, Lora, Sft, Unfreeze
from pipeline.runs.run import Run

Row = tuple[str, str]
"""A term and what is said of it."""

_TARGETS = {
    "all-linear": "every linear layer but the head",
    "qkvo": "the four projections of attention (q, k, v, o)",
    "qv": "the query and value projections of attention",
}


def asked_of(experiment: Experiment, stages: set[str]) -> list[Row]:
    """The experiment as a person would read it, as far as `stages` go."""
    return list(_asked(experiment, stages))


def _asked(experiment: Experiment, stages: set[str]) -> Iterator[Row]:
    model, lora, evaluation = experiment.model, experiment.scope.lora, experiment.evaluation
    base = model.id + (f" at {model.revision}" if model.revision else "")
    held = ", held in 4 bits (NF4)" if model.quantize == "nf4" else ""
    yield "Base model", f"{base}{held}"
    yield "Adapter", "none, opened weights alone" if lora is None else _adapter(lora)
    if "sft" in stages:
        sft = experiment.sft
        yield "SFT", f"{_rhythm(sft)}{_opened(experiment.unfreeze_of('sft')[0])}"
    if "dpo" in stages:
        dpo = experiment.dpo
        losses = dpo.loss_type if isinstance(dpo.loss_type, str) else " + ".join(dpo.loss_type)
        opened = _opened(experiment.unfreeze_of("dpo")[0])
        trains = {"continue": "", "new": " of a new adapter on the SFT adapter", "frozen": " under a frozen adapter"}
        yield "DPO", f"{losses} loss, beta {dpo.beta:g}{trains[dpo.adapter]}; {_rhythm(dpo)}{opened}"
    asks = []
    if evaluation.output_schema is not None:
        asks.append(f"conforms to {Path(evaluation.output_schema).name}")
    if evaluation.match:
        asks.append(f"has the reference's {', '.join(evaluation.match)}")
    for name, check in evaluation.checks.items():
        asks += [f"{name}: {key.replace('_', ' ')} {value}" for key, value in check.model_dump().items() if value]
    if evaluation.prompts is not None:
        few = f"the first {evaluation.max_prompts} prompts" if evaluation.max_prompts else "every prompt"
        yield "Held-out", f"{few} of {Path(evaluation.prompts).name}, up to {evaluation.max_new_tokens} new tokens"
    if asks:
        yield "An answer passes if it", "; ".join(asks)
    if (tasks := evaluation.lm_eval) is not None:
        rows = f"the first {tasks.limit:,} rows of " if tasks.limit else ""
        yield "lm-eval", rows + ", ".join(tasks.tasks)
    yield "Seed", str(experiment.seed)


def _adapter(lora: Lora) -> str:
    targets = lora.target_modules
    where = _TARGETS[targets] if isinstance(targets, str) else ", ".join(targets)
    blocks = {"all": "in all blocks", "last-half": "in the last half of the blocks"}
    which = blocks[lora.layers] if isinstance(lora.layers, str) else "in blocks " + ", ".join(map(str, lora.layers))
    kind = "DoRA" if lora.use_dora else "LoRA"
    return f"{kind} of rank {lora.r}, alpha {lora.lora_alpha}, on {where}, {which}"


def _rhythm(stage: Sft | Dpo) -> str:
    long = f"{stage.max_steps:,} steps" if stage.max_steps > 0 else f"{stage.num_train_epochs:g} epochs"
    batch = stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    warmup = stage.warmup_steps
    ramp = f", warm-up {100 * warmup:g} % of the steps" if 0 < warmup < 1 else f", warm-up {warmup:g} steps"
    return (
        f"{long} of {batch} rows at learning rate {stage.learning_rate:g} "
        f"({stage.lr_scheduler_type}{ramp if warmup else ''}), up to {stage.max_length:,} tokens a row"
    )


def _opened(unfreeze: Unfreeze) -> str:
    parts = [f"the last {unfreeze.last_blocks} blocks"] if unfreeze.last_blocks else []
    parts += ["the final norm"] if unfreeze.final_norm else []
    parts += ["the head"] if unfreeze.lm_head else []
    return f"; beside the adapter {', '.join(parts)} at {unfreeze.learning_rate:g}" if parts else ""


def data_of(run: Run) -> list[dict[str, Any]]:
    """A row for each data file of a run."""
    found = []
    for entry in run.manifest.get("data", []):
        tokens, aside = entry.get("tokens", {}), entry.get("set_aside", {})
        notes = [f"{code}: {one['rows']:,} rows" for code, one in tokens.get("findings", {}).items()]
        if tokens.get("truncated"):
            notes.append(f"{tokens['truncated']:,} rows longer than {tokens['max_length']:,} tokens")
        found.append(
            {
                "run": run.path.name,
                "file": Path(str(entry.get("path"))).name,
                "use": entry.get("use", ""),
                "kind": entry.get("kind", ""),
                "rows": entry.get("rows"),
                "used": tokens.get("used"),
                "tokens": tokens.get("tokens"),
                "loss_tokens": tokens.get("loss_tokens"),
                "longest": tokens.get("longest"),
                "sha256": str(entry.get("sha256") or ""),
                "notes": notes,
                "set_aside": aside.get("rows", 0),
                "reasons": [f"{code}: {count:,}" for code, count in aside.get("codes", {}).items()],
            }
        )
    return found


def proof_of(run: Run) -> list[Row]:
    """What a DPO run proved of its reference; empty for others and for runs that did not come so far."""
    reference = run.manifest.get("reference") or {}
    if "drift" not in reference:
        return []
    rows = [
        ("Reference", f"{run.manifest.get('parent')}, sha256 of base, adapter and template {reference['hash']}"),
        (
            "At step 0",
            f"loss {reference['start_loss']:.6f} (ln 2 = 0.693147 for the plain sigmoid loss), under the SFT adapter "
            "reopened from the disk",
        ),
        ("Drift", f"{reference['drift']:g} nats between the first step and the last, on {reference['pairs']} pairs"),
    ]
    saved = reference.get("saved")
    if saved:
        rows.append(
            (
                "Saved folders",
                f"reopened by stock PEFT, {saved['policy']:.1e} nats and {saved['margin']:.1e} of margin from what was "
                "trained",
            )
        )
    unmoved = reference.get("unmoved") or []
    moved = f"all moved but {', '.join(unmoved)}" if unmoved else "all moved"
    rows.append(("Trained weights", f"{moved}; frozen ones did not"))
    return rows


def lineage_of(chain: list[Run]) -> list[dict[str, str]]:
    """From the base to the last run: name, what it is, and its hash.

    Args:
        chain: the runs, each one's parent before it.
    """
    first = chain[0].manifest
    base = first.get("base", {})
    revision = f", revision {base['revision']}" if base.get("revision") else ""
    found = [{"name": str(base.get("id")), "what": f"base weights{revision}", "sha256": str(base.get("sha256") or "")}]
    parent = first.get("parent")
    if parent is not None:  # a foreign adapter, or a run that is gone
        sha256 = (first.get("reference") or {}).get("adapter_sha256")
        found.append({"name": str(parent), "what": "starting adapter", "sha256": str(sha256 or "")})
    for run in chain:
        sha256 = (run.manifest.get("adapter") or {}).get("sha256")
        found.append({"name": run.name, "what": f"{run.stage.upper()} adapter", "sha256": str(sha256 or "")})
    return found


def environment_of(run: Run) -> list[Row]:
    """Machine, code, versions and times of a run."""
    manifest = run.manifest
    git = manifest.get("git")
    commit = "not in a repository"
    if git:
        commit = f"{git['commit']}{', with uncommitted changes' if git.get('dirty') else ''}"
    trainable = manifest.get("trainable") or {}
    rows = [
        ("Status", run.status),
        ("Time", _time(manifest.get("start"), manifest.get("end"))),
        ("Device", str(manifest.get("device", ""))),
        ("Command", " ".join(map(str, manifest.get("argv", [])))),
        ("Commit", commit),
        ("Chat template", str((manifest.get("tokenizer") or {}).get("template_sha256"))),
        (
            "Versions",
            ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items() if version),
        ),
    ]
    if trainable:
        share = f"{trainable['trainable_parameters']:,} of {trainable['all_parameters']:,} parameters"
        rows.insert(2, ("Trainable", f"{share} ({trainable['trainable_percent']:g} %)"))
    error = manifest.get("error")
    if error:
        rows.insert(1, ("Ended with", f"{error.get('message')} [{error.get('code')}]"))
    return [(term, text) for term, text in rows if text]


def _time(start: Any, end: Any) -> str:
    if not start or not end:
        return str(start or "")
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    return f"{start} to {end} ({seconds / 60:.1f} minutes)"
