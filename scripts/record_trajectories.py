"""Trains each class of `tests/invariant/trajectories.py` on stock TRL and writes down what every step logged.

OMP_NUM_THREADS=1 python scripts/record_trajectories.py [CLASS …]     those named, else all; the others stay

Nothing of this project has a part in it: TRL's own trainers tokenise the rows and train, the reference of DPO is a
model of its own, PEFT's adapter merged into its base, and opened weights are set to train in the policy's own blocks.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.invariant.trajectories import (
    CASES,
    DEPTH,
    LIBRARIES,
    LORA,
    OPENED_RATE,
    RATES,
    RECORDED,
    RHYTHM,
    SEED,
    Case,
    save_base,
    save_start,
    write_rows,
)

FIGURES = {"sft": ("loss", "mean_token_accuracy"), "dpo": ("loss", "rewards/margins")}


def environment() -> dict[str, Any]:
    """What a record was made in: its figures are those of another one up to rounding."""
    import torch

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def record(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Trains a case on stock TRL.

    Args:
        case: of the table.
        folder: an empty one to work in.

    Returns:
        For each optimizer step what TRL logged of it, and the learning rates that the optimizer took.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    steps: list[dict[str, Any]] = []
    rates: list[list[float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                figures = {name: logs[name] for name in (*FIGURES[case.stage], "grad_norm")}
                steps.append({**figures, "learning_rates": rates[-1]})

    base = save_base(folder / "base", case)
    rows = write_rows(folder / "rows.jsonl", case)
    settings = {"learning_rate": OPENED_RATE if case.adapter == "frozen" else RATES[case.stage], **RHYTHM}
    config = (SFTConfig if case.stage == "sft" else DPOConfig)(
        **{**settings, **case.settings},
        output_dir=str(folder / "trained"),
        seed=SEED,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model, more = _load(base), {}
    if case.stage == "dpo":
        start = save_start(folder / "start", base, case)
        more["ref_model"] = _sft_model(_load(base), start)
    set_seed(SEED)  # a new adapter starts at random
    policy = _new_lora(model, case) if case.stage == "sft" else _dpo_policy(model, start, more["ref_model"], case)
    trainer = (SFTTrainer if case.stage == "sft" else DPOTrainer)(
        model=policy,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Watch()],
        optimizers=(_optimizer(policy, config), None),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps


def _load(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _new_lora(model: Any, case: Case) -> Any:
    from peft import LoraConfig, get_peft_model

    opened = [f"model.layers.{at}" for at in case.blocks()[len(case.blocks()) - case.opened :]]
    left = case.blocks()[: len(case.blocks()) - case.opened]
    modules = [*opened, "model.norm", *(["lm_head"] if case.head else [])] if case.opened else None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=case.targets(),
        layers_to_transform=left,
        modules_to_save=modules,
        **LORA,
    )
    return get_peft_model(model, config)


def _sft_model(base: Any, start: Path) -> Any:
    """The SFT model without PEFT, frozen."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, start).merge_and_unload().requires_grad_(False)


def _dpo_policy(base: Any, start: Path, reference: Any, case: Case) -> Any:
    """The SFT model, with what trains in it; what is opened starts at a copy of the reference's."""
    import torch
    from peft import PeftModel

    if case.adapter == "new":
        return _new_lora(_sft_model(base, start), case)
    if case.adapter == "frozen":
        policy = inner = _sft_model(base, start)
    else:
        policy = PeftModel.from_pretrained(base, start, is_trainable=True)
        inner = policy.get_base_model()
    if case.opened:
        for at in range(DEPTH - case.opened, DEPTH):
            inner.model.layers[at] = copy.deepcopy(reference.model.layers[at]).requires_grad_(True)
        inner.model.norm.requires_grad_(True)
    if case.head:  # untied
        inner.lm_head.weight = torch.nn.Parameter(inner.lm_head.weight.detach().clone())
    return policy


def _optimizer(policy: Any, config: Any) -> Any:
    """Trainer's own, with a group for LoRA and one for what is opened."""
    from transformers import Trainer

    kind, given = Trainer.get_optimizer_cls_and_kwargs(config)
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    lora = [parameter for name, parameter in trained if "lora_" in name]
    opened = [parameter for name, parameter in trained if "lora_" not in name]
    groups: list[dict[str, Any]] = [{"params": lora}] if lora else []
    if opened:
        groups.append({"params": opened, "lr": OPENED_RATE})
    return kind(groups, **{**given, "weight_decay": 0.0})


def write(records: dict[str, Any]) -> None:
    """One line for each step, classes in the table's order."""
    lines = []
    for name in (name for name in CASES if name in records):
        made, steps = records[name]["environment"], records[name]["steps"]
        inside = ",\n".join(f"      {json.dumps(step)}" for step in steps)
        lines.append(f'  "{name}": {{\n    "environment": {json.dumps(made)},\n    "steps": [\n{inside}\n    ]\n  }}')
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _be_quiet() -> None:
    import datasets
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="those to record (default: all)", metavar="CLASS")
    wanted = parser.parse_args().classes or list(CASES)
    if unknown := set(wanted) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    _be_quiet()
    records = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            steps = [
                {key: value if key == "learning_rates" else round(value, 7) for key, value in step.items()}
                for step in record(CASES[name], Path(folder))
            ]
        records[name] = {"environment": environment(), "steps": steps}
        print(name, *(f"{step['loss']:.5f}" for step in steps), flush=True)
    assert not [name for name in sys.modules if name.split(".")[0] == "pipeline"], "stock TRL, with nothing of ours"
    write(records)


if __name__ == "__main__":
    main()
