"""What a stage says and records of itself: its data, what trains, where it came from, how it ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.data.aside import SetAside, count_codes
from pipeline.data.check import CheckedRows, Report
from pipeline.data.tokenised import Counted
from pipeline.experiment import Experiment, Split, Unfreeze
from pipeline.model.base import template_sha256, tokenizer_sha256
from pipeline.model.ground import Ground, Say
from pipeline.model.scope import Trainable
from pipeline.runs.provenance import provenance


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
