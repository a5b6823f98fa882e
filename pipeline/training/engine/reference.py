"""The frozen reference's log-probabilities, computed once and kept on the disk.

What they depend on is the key of a folder: base weights, adapter weights, precision, attention path and library
versions. In it, a row is found by the digest of its token ids, so that runs share what they have in common whatever
their data files, seeds and batch sizes are. Files are written whole and never changed; each run adds its own. What
was found is believed only after a sample was scored again by the reference in memory.

TRL takes the values through its own columns, so that its loss stays its own.
"""

from __future__ import annotations

import array
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.cache import KEY
from pipeline.runs.files import write_json

LIBRARIES = ("torch", "transformers", "peft", "trl")
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SAMPLE = 4
_SAVED_EVERY = 4096
"""Rows in one file: what an interrupted run has scored by then is kept."""

Logps = dict[bytes, tuple[float, float]]
"""Log-probabilities of chosen and rejected, in nats, by the digest of their row."""


def reference_key(
    *, base_sha256: str, adapter_sha256: str, precision: str, attention: str, ld_alpha: float | None = None
) -> dict[str, Any]:
    """All that the reference's log-probabilities depend on, but for the token ids.

    Args:
        base_sha256: of the base's weights.
        adapter_sha256: of the SFT adapter's.
        precision: of weights and of products, and on what kind of device; how the base is quantised.
        attention: the implementation, and whether completions share a row.
        ld_alpha: TRL's weight of tokens past the shorter completion, which it puts into the sums.
    """
    return {
        "base_sha256": base_sha256,
        "adapter_sha256": adapter_sha256,
        "precision": precision,
        "attention": attention,
        "ld_alpha": ld_alpha,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def row_digest(row: Mapping[str, Any]) -> bytes:
    """Names a pair by its token ids: 32 bytes."""
    digest = hashlib.sha256()
    for name in _IDS:
        ids = row[name]
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(array.array("q", ids).tobytes())
    return digest.digest()


class ReferenceStore:
    """The files of one reference.

    Args:
        root: where references are kept.
        key: of `reference_key`.
    """

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        self._key = key
        self.folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> Logps:
        """All that is kept; a damaged file is removed, and its rows are scored again."""
        found: Logps = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                tensors = load_file(file)
                rows, logps = tensors["rows"].numpy(), tensors["logps"].tolist()
            except (SafetensorError, KeyError, OSError):
                file.unlink(missing_ok=True)
                continue
            found.update(
                {row.tobytes(): (chosen, rejected) for row, (chosen, rejected) in zip(rows, logps, strict=True)}
            )
        return found

    def write(self, logps: Logps) -> None:
        """Adds a file with these rows.

        Raises:
            OSError: it cannot be written.
            SafetensorError: the same.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / KEY).is_file():
            write_json(self.folder / KEY, self._key)
        rows = torch.frombuffer(bytearray(b"".join(logps)), dtype=torch.uint8).view(-1, 32)
        tensors = {"rows": rows, "logps": torch.tensor(list(logps.values()), dtype=torch.float32)}
        name = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as staged:
            save_file(tensors, Path(staged) / name)
            (Path(staged) / name).rename(self.folder / f"{name}.safetensors")

    def drop(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def precompute_reference(
    trainer: Any, store: ReferenceStore, tolerance: float, say: Callable[[str], None]
) -> dict[str, int]:
    """Puts the reference's log-probabilities beside every row of the trainer, as TRL's precomputed columns.

    Args:
        trainer: a DPOTrainer whose datasets hold `prompt_ids`, `chosen_ids` and `rejected_ids`.
        store: what is kept of this reference.
        tolerance: how far a row scored again may be from what was kept, in nats.
        say: tells the user one line.

    Returns:
        How many distinct rows were `scored` and how many `found`.
    """
    datasets = {name: getattr(trainer, name) for name in ("train_dataset", "eval_dataset")}
    digests = {name: [row_digest(row) for row in data] for name, data in datasets.items() if data is not None}
    rows = {digest: row for name, some in digests.items() for digest, row in zip(some, datasets[name], strict=True)}
    # Each process looks after its share, and the shares are put together.
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = dict(list(rows.items())[process::processes])
    kept = store.read()
    found = {digest: kept[digest] for digest in mine if digest in kept}
    apart = _apart(trainer, mine, found)
    if not apart <= tolerance:
        say(f"reference: what was kept is {apart:.3g} nats off when scored again, and is thrown away")
        store.drop()
        found = {}
    missing = {digest: row for digest, row in mine.items() if digest not in found}
    if len(rows) > len(found):
        say(f"reference: scoring {len(missing):,} pairs, {len(found):,} are kept from before")
    try:
        scored = _score_and_keep(trainer, missing, store)
    except (OSError, SafetensorError) as error:
        say(f"reference: cannot be kept in {store.folder}: {error}")
        scored = _scored(trainer, missing)
    everything: Logps = {}
    account = {"scored": 0, "found": 0}
    for share, anew in _gathered(trainer, ({**found, **scored}, len(missing))):
        everything.update(share)
        account["scored"] += anew
        account["found"] += len(share) - anew
    for name, some in digests.items():
        data = datasets[name]
        for at, column in enumerate(COLUMNS):
            data = data.add_column(column, [everything[digest][at] for digest in some])
        setattr(trainer, name, data)
    trainer.precompute_ref_logps = True
    return account


def _apart(trainer: Any, rows: Mapping[bytes, Any], found: Logps) -> float:
    """The largest difference of a few rows scored again, in nats."""
    sample = list(found)[:: max(math.ceil(len(found) / _SAMPLE), 1)]
    again = _scored(trainer, {digest: rows[digest] for digest in sample})
    return max(
        (abs(one - other) for digest in sample for one, other in zip(again[digest], found[digest], strict=True)),
        default=0.0,
    )


def _score_and_keep(trainer: Any, rows: Mapping[bytes, Any], store: ReferenceStore) -> Logps:
    scored: Logps = {}
    digests = list(rows)
    for at in range(0, len(digests), _SAVED_EVERY):
        part = _scored(trainer, {digest: rows[digest] for digest in digests[at : at + _SAVED_EVERY]})
        store.write(part)
        scored.update(part)
    return scored


def _scored(trainer: Any, rows: Mapping[bytes, Any]) -> Logps:
    """The rows under the reference in memory, rows of a length together."""
    size = trainer.args.per_device_eval_batch_size
    order = sorted(
        rows, key=lambda digest: -sum(len(rows[digest][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    )
    scored: Logps = {}
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        for at in range(0, len(order), size):
            digests = order[at : at + size]
            batch = trainer._prepare_inputs(trainer.data_collator([rows[digest] for digest in digests]))
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
            scored.update(zip(digests, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
    finally:
        trainer.model.train(was_training)
    return scored


def _gathered(trainer: Any, mine: tuple[Logps, int]) -> Sequence[tuple[Logps, int]]:
    if trainer.accelerator.num_processes == 1:
        return [mine]
    shares: list[Any] = [None] * trainer.accelerator.num_processes
    torch.distributed.all_gather_object(shares, mine)
    return shares
