"""Run folders as the stages leave them, written by hand: no model is needed to read what runs recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.experiment import Experiment
from pipeline.experiment_file import dump_experiment
from pipeline.runs.run import Run, read_run

HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
"""What a user's data or a model may hold; on the page it is text."""


def estimate(value: float, low: float, high: float, n: int = 4) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def sample(number: int, outputs: dict[str, str], failing: dict[str, list[str]]) -> dict[str, Any]:
    names = ["json_conformance", "check/polite", "ends_by_itself"]
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{number}: {HOSTILE}"}],
        "reference": f"{HOSTILE} reference",
        "outputs": outputs,
        "checks": {model: {name: name not in failing.get(model, []) for name in names} for model in outputs},
    }


def comparison() -> dict[str, Any]:
    """A `compare.json` of base, SFT and DPO on four prompts."""
    return {
        "models": ["base", "sft", "dpo"],
        "versions": {"sft": {"run": "lights/sft-001", "sha256": "5f7a"}},
        "base": "base",
        "metrics": {
            "base": {"check/polite": estimate(0.25, 0.05, 0.7), "perplexity": estimate(16.08, 14.8, 17.4)},
            "sft": {
                "check/polite": estimate(0.5, 0.15, 0.85),
                "perplexity": estimate(1.69, 1.61, 1.79),
                "preference_margin": estimate(-0.73, -1.5, 0.04),
            },
            "dpo": {
                "check/polite": estimate(1.0, 0.51, 1.0),
                "perplexity": estimate(1.67, 1.58, 1.77),
                "preference_margin": estimate(0.3, 0.21, 0.41),
            },
        },
        "deltas": {
            "sft": {"check/polite": estimate(0.25, -0.2, 0.6), "perplexity": estimate(-14.4, -15.7, -13.2)},
            "dpo": {"check/polite": estimate(0.75, 0.2, 0.9), "perplexity": estimate(-14.4, -15.7, -13.2)},
        },
        "between": {},
        "verdict": {
            "best": "dpo",
            "decided": True,
            "stated": True,
            "sentence": f"dpo should survive: {HOSTILE}",
            "scores": {},
            "leads": {},
            "gains": {"base": ["check/polite"], "sft": []},
            "losses": {"base": [], "sft": ["perplexity"]},
        },
        "pairs": [
            {
                "prompt": [{"role": "user", "content": f"pair {number} {HOSTILE}"}],
                "chosen": [{"role": "assistant", "content": f"yes {number}"}],
                "rejected": [{"role": "assistant", "content": f"no {number}"}],
                "margins": {"sft": -0.1 * number, "dpo": 0.1 * number - 0.25},
            }
            for number in range(12)
        ],
        "absent": {"sft": {"kl": "not finite"}},
        "seconds": {"base": 1.2, "sft": 2.0, "dpo": 3.0},
        "samples": [
            sample(1, {"base": "What?", "sft": "It is red, soon.", "dpo": "It is red."}, {"sft": ["check/polite"]}),
            sample(2, {"base": HOSTILE, "sft": "It is blue.", "dpo": "It is blue."}, {"base": ["json_conformance"]}),
            sample(3, {"base": "Eh", "sft": "Soon", "dpo": "Now"}, {"base": ["check/polite"], "sft": ["check/polite"]}),
            sample(4, {"base": "a", "sft": "a", "dpo": "a"}, {}),
        ],
    }


def definition(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": "lights",
        "model": {"id": "/models/tiny"},
        "data": {
            "demonstrations": {"train": "/data/demonstrations.jsonl"},
            "preferences": {"train": "/data/preferences.jsonl"},
        },
        "scope": {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "qv"}},
        "sft": {"num_train_epochs": 2, "learning_rate": 5.0e-2, "per_device_train_batch_size": 4},
        "dpo": {"beta": 0.2, "max_steps": 3, "warmup_steps": 0.1, "unfreeze": {"last_blocks": 1, "lm_head": True}},
        "evaluation": {
            "prompts": "/data/held-out.jsonl",
            "match": ["colour"],
            "checks": {"polite": {"must_not_match": "soon"}},
        },
    }
    return {**value, **changes}


def write_run(folder: Path, stage: str, metrics: list[dict[str, Any]], **fields: Any) -> Run:
    """A finished run as its stage would leave it; `fields` go into the manifest, `definition` is the experiment."""
    folder.mkdir(parents=True)
    experiment = Experiment.model_validate(fields.pop("definition", definition()))
    (folder / "experiment.yaml").write_text(dump_experiment(experiment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    manifest = {
        "stage": stage,
        "status": "finished",
        "experiment": folder.parent.name,
        "start": "2026-11-22T10:00:00+00:00",
        "end": "2026-11-22T10:03:00+00:00",
        "base": {"id": "/models/tiny", "revision": None, "sha256": "ba5e" * 16},
        "tokenizer": {"template_sha256": "7e37" * 16},
        "device": "CPU (2 threads), float32",
        "data": [],
        "metrics": metrics[-1] if metrics else {},
        "argv": ["pipeline", stage, HOSTILE],
        "git": {"commit": "c0ffee", "dirty": True},
        "versions": {"torch": "2.13.0", "peft": "0.21.2", "wandb": None},
        "parent": None,
        "adapter": {"sha256": f"{stage:0<64}"},
        **fields,
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    return read_run(folder)


def write_runs(root: Path, compared: dict[str, Any]) -> Run:
    """`lights/sft-001`, and `lights/dpo-001` on it, compared; the latter."""
    write_run(
        root / "lights" / "sft-001",
        "sft",
        [
            {"step": 1, "loss": 3.0, "learning_rate": 0.0, "mean_token_accuracy": 0.4},
            {"step": 2, "loss": 1.5, "learning_rate": 0.05, "mean_token_accuracy": 0.6},
            {"step": 2, "eval_loss": 1.25, "eval_mean_token_accuracy": 0.7},
        ],
        data=[
            {
                "path": f"/data/{HOSTILE.replace('/', '_')}.jsonl",
                "use": "train",
                "kind": "demonstration",
                "sha256": "da7a" * 16,
                "rows": 12,
                "tokens": {
                    "max_length": 64, "used": 11, "truncated": 1, "tokens": 1234, "loss_tokens": 567, "longest": 64,
                    "findings": {"completion-cut": {"rows": 1, "percent": 8.33, "severity": "warning"}},
                },
                "set_aside": {"rows": 1, "codes": {"control-token": 1}},
            }
        ],
        health=[
            {"code": "grad-spike", "step": 2, "figure": 9.5, "message": f"a spike {HOSTILE}", "mend": "clip"},
        ],
    )  # fmt: skip
    dpo = write_run(
        root / "lights" / "dpo-001",
        "dpo",
        [
            {"step": step, "loss": 0.7 - 0.1 * step, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step,
             "rewards/margins": 0.2 * step, "rewards/accuracies": 0.5, "logps/chosen": -20.0, "logps/rejected": -30.0,
             "learning_rate": 1e-5, "learning_rate/opened": 1e-6}
            for step in (1, 2, 3)
        ],
        parent="lights/sft-001",
        reference={
            "hash": "4ef" * 21, "adapter_sha256": f"{'sft':0<64}", "drift": 0.0, "pairs": 8,
            "start_loss": 0.6931471824, "unmoved": [], "saved": {"policy": 2e-4, "margin": 3e-6},
        },
        health=[],
    )  # fmt: skip
    (dpo.path / "compare.json").write_text(json.dumps(compared))
    return dpo
