"""The frozen reference's log-probabilities, computed once, when first asked for, and kept on the disk.

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
from pipeline.model.device import Placement
from pipeline.runs.files import write_json
from pipeline.training.engine.precision import Products

LIBRARIES = ("torch", "transformers", "peft", "trl")
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SAMPLE = 4
"""Rows kept from before that are scored again before the others are believed."""
_WRITTEN_AT_LEAST = 64
"""Rows in one file, but for the last before a checkpoint."""

Logps = dict[bytes, tuple[float, float]]
"""Log-probabilities of chosen and rejected, in nats, by the digest of their row."""
Score = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Scores a batch under the reference in memory: `[B]` nats of the chosen, and of the rejected."""


def reference_key(
    *,
    base_sha256: str,
    adapter: Mapping[str, str],
    placement: Placement,
    quantize: str,
    products: Products,
    attention: str,
    ld_alpha: float | None = None,
) -> dict[str, Any]:
    """All that the reference's log-probabilities depend on, but for the token ids.

    Args:
        base_sha256: of the base's weights.
        adapter: `hashes_of` the SFT adapter.
        placement: in which precision the base's weights are held, and on what kind of device.
        quantize: how the base is quantised.
        products: whether float32 products are rounded.
        attention: the implementation, and whether completions share a row.
        ld_alpha: TRL's weight of tokens past the shorter completion, which it puts into the sums.
    """
    dtype = str(placement.dtype).removeprefix("torch.")
    weights = f"{dtype} on {placement.device.type}, quantize {quantize}"
    return {
        "base_sha256": base_sha256,
        "adapter_sha256": f"{adapter['sha256']} {adapter['config_sha256']}",
        "precision": f"{weights}, {'rounded' if products.round else 'exact'} products",
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


class KeptReference:
    """Log-probabilities of the reference: found, or scored in the step that first asks for them, and then kept.

    Args:
        store: what is kept of this reference from before.
        tolerance: how far a row scored again may be from what was kept, in nats.
        say: tells the user one line.
    """

    def __init__(self, store: ReferenceStore, tolerance: float, say: Callable[[str], None]) -> None:
        self._store = store
        self._tolerance = tolerance
        self._say = say
        self._before = store.read()
        self._unconfirmed = SAMPLE
        self._used: set[bytes] = set()
        self._new: Logps = {}
        self._unwritten: Logps = {}
        if self._before:
            say(f"reference: {len(self._before):,} pairs are kept from before")

    def logps(self, batch: Mapping[str, torch.Tensor], score: Score) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's sums over the completions of a batch.

        Args:
            batch: TRL's.
            score: scores all of it.

        Returns:
            Those of the chosen and of the rejected completions, `[B]` float32 nats each.
        """
        digests = _digests(batch)
        old = [digest for digest in digests if digest in self._before]
        if any(digest not in self._before and digest not in self._new for digest in digests) or (
            old and self._unconfirmed > 0
        ):
            chosen, rejected = score()
            values = zip(chosen.tolist(), rejected.tolist(), strict=True)
            self._take(dict(zip(digests, values, strict=True)), old)
        known = [self._before.get(digest) or self._new[digest] for digest in digests]
        self._used.update(digest for digest in digests if digest in self._before)
        chosen, rejected = torch.tensor(known, device=batch["input_ids"].device).unbind(dim=1)
        return chosen, rejected

    def _take(self, scored: Logps, old: Sequence[bytes]) -> None:
        """Holds what was kept against what was scored, and adds what is new."""
        pairs = [(scored[digest], self._before[digest]) for digest in old]
        apart = max((abs(one - other) for pair in pairs for one, other in zip(*pair, strict=True)), default=0.0)
        self._unconfirmed -= len(old)
        if not apart <= self._tolerance:
            self._say(f"reference: what was kept is {apart:.3g} nats off when scored again, and is thrown away")
            self._store.drop()
            self._before, self._used = {}, set()
            self._unwritten = dict(self._new)
        fresh = {
            digest: values
            for digest, values in scored.items()
            if digest not in self._before and digest not in self._new
        }
        self._new |= fresh
        self._unwritten |= fresh
        # Files that grow with what there is: few files for many rows, and a killed run loses little.
        if len(self._unwritten) >= max(_WRITTEN_AT_LEAST, len(self._new) // 8):
            self.write()

    def write(self) -> None:
        """Brings what is new to the disk: before a checkpoint, so that a resumed run reads the same numbers."""
        if not self._unwritten:
            return
        try:
            self._store.write(self._unwritten)
        except (OSError, SafetensorError) as error:
            self._say(f"reference: cannot be kept in {self._store.folder}: {error}")
        self._unwritten = {}

    def account(self) -> dict[str, int]:
        """How many distinct rows were `scored` and how many `found`, in this process."""
        return {"scored": len(self._new), "found": len(self._used)}


def keep_evaluated(
    store: ReferenceStore, reference: Logps, rows: Sequence[Mapping[str, Any]], rewards: torch.Tensor, beta: float
) -> None:
    """Keeps what the last evaluation read of the trained weights: `compare` reads it, and a stage that starts there.

    Args:
        store: of the trained weights, as if they were a reference.
        reference: what is kept of the reference that the rewards are against; where a row is not, nothing is kept.
        rows: N pairs.
        rewards: `[N, 2]` of chosen and rejected, each beta times a difference of log-probabilities.
        beta: DPO's.

    Raises:
        OSError: they cannot be written.
        SafetensorError: the same.
    """
    digests = [row_digest(row) for row in rows]
    if all(digest in reference for digest in digests):
        logps = torch.tensor([reference[digest] for digest in digests]) + rewards / beta
        store.write({digest: (own[0], own[1]) for digest, own in zip(digests, logps.tolist(), strict=True)})


def _digests(batch: Mapping[str, torch.Tensor]) -> list[bytes]:
    """`row_digest` of each pair of TRL's batch."""
    names = ("input_ids", "attention_mask", "completion_mask")
    rows = [
        [
            [token for token, used, completion in zip(*row, strict=True) if used and completion == part]
            for part in (0, 1)
        ]
        for row in zip(*(batch[name].tolist() for name in names), strict=True)
    ]
    half = len(rows) // 2
    return [
        row_digest({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        for (prompt, chosen), (_, rejected) in zip(rows[:half], rows[half:], strict=True)
    ]
