from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import cache
from pipeline.experiment_file import load_experiment
from pipeline.training.dpo import run_dpo
from pipeline.training.engine import reference
from pipeline.training.engine.reference import ReferenceStore, reference_key, row_digest
from pipeline.training.sft import run_sft

ROW = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
KEY = {"base_sha256": "b", "adapter_sha256": "a", "precision": "float32", "attention": "sdpa", "ld_alpha": None}


def test_a_row_is_named_by_its_ids_and_where_they_are_cut() -> None:
    digests = {
        row_digest(ROW),
        row_digest({**ROW, "prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4, 5]}),
        row_digest({**ROW, "rejected_ids": [4]}),
        row_digest({**ROW, "chosen_ids": [4, 5], "rejected_ids": [3]}),
    }
    assert len(digests) == 4
    assert row_digest({**ROW, "ref_chosen_logps": 1.0}) == row_digest(ROW)


@pytest.mark.parametrize("part", KEY)
def test_each_part_of_the_key_leads_to_another_folder(tmp_path: Path, part: str) -> None:
    store = ReferenceStore(tmp_path, reference_key(**KEY))
    store.write({row_digest(ROW): (-1.0, -2.0)})
    assert ReferenceStore(tmp_path, reference_key(**KEY)).read() == {row_digest(ROW): (-1.0, -2.0)}
    other = 0.5 if part == "ld_alpha" else "other"
    assert ReferenceStore(tmp_path, reference_key(**{**KEY, part: other})).read() == {}


@pytest.mark.parametrize("library", reference.LIBRARIES)
def test_another_version_of_a_library_leads_to_another_folder(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ReferenceStore(tmp_path, reference_key(**KEY)).folder
    stock = reference.version
    monkeypatch.setattr(reference, "version", lambda name: "0" if name == library else stock(name))
    assert ReferenceStore(tmp_path, reference_key(**KEY)).folder != before


def test_runs_add_up_and_a_damaged_file_is_scored_again(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, reference_key(**KEY))
    other = row_digest({**ROW, "prompt_ids": [9]})
    store.write({row_digest(ROW): (-1.0, -2.0)})
    store.write({other: (-3.0, -4.0)})
    assert store.read() == {row_digest(ROW): (-1.0, -2.0), other: (-3.0, -4.0)}
    file = sorted(store.folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])
    assert len(store.read()) == 1
    assert not file.exists()


@pytest.fixture
def trained(write_experiment: Callable[..., Path], tmp_path: Path, console: Any) -> Callable[..., Any]:
    """Runs DPO with changes, on one SFT run; returns the outcome and its manifest."""
    root = tmp_path / "checkpoints"
    run_sft(load_experiment(write_experiment(sft={"max_steps": 2})).experiment, root, console)

    def train(**changes: Any) -> tuple[Any, dict[str, Any]]:
        outcome = run_dpo(load_experiment(write_experiment(dpo={"max_steps": 3, **changes})).experiment, root, console)
        return outcome, json.loads((outcome.run / "run.json").read_text())["engine"]["reference"]

    return train


def test_a_second_run_scores_nothing_and_trains_alike(trained: Callable[..., Any]) -> None:
    first, one = trained()
    second, two = trained()
    assert (one["scored"], one["found"]) == (16, 0)
    assert (two["scored"], two["found"]) == (0, 16)
    for name in ("loss", "rewards/margins", "logps/chosen", "eval_loss"):
        assert first.metrics[name] == second.metrics[name], name


def test_rhythm_and_batches_do_not_matter_but_what_is_cut_does(trained: Callable[..., Any]) -> None:
    trained()
    _, same = trained(per_device_train_batch_size=2, learning_rate=1.0e-4, beta=0.3)
    assert same["scored"] == 0
    _, cut = trained(max_length=40)
    assert cut["scored"] > 0
    assert cut["key"] == same["key"]


def test_what_is_kept_is_the_live_reference(trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the columns taken away TRL scores the reference in every step: the curve is the same."""
    kept, _ = trained()

    def live(trainer: Any, *rest: Any) -> dict[str, int]:
        return {"scored": 0, "found": 0}

    monkeypatch.setattr("pipeline.training.dpo.precompute_reference", live)
    each_step, _ = trained()
    for name in ("loss", "rewards/chosen", "rewards/margins", "eval_rewards/margins"):
        assert kept.metrics[name] == pytest.approx(each_step.metrics[name], abs=1e-5), name


def test_values_that_the_reference_does_not_confirm_are_thrown_away(trained: Callable[..., Any], console: Any) -> None:
    good, account = trained()
    store = ReferenceStore(cache.folder_of("references"), account["key"])
    wrong = {digest: (chosen - 1, rejected) for digest, (chosen, rejected) in store.read().items()}
    store.drop()
    store.write(wrong)
    again, account = trained()
    assert account["scored"] == 16
    assert "1 nats off" in console.file.getvalue()
    assert again.metrics["rewards/margins"] == good.metrics["rewards/margins"]
    assert store.read() != wrong


def test_a_cache_that_cannot_be_written_is_no_failure(
    trained: Callable[..., Any], console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    _, account = trained()
    assert account["scored"] == 16
    assert "cannot be kept" in console.file.getvalue()


def test_a_frozen_adapter_stays_frozen_when_the_reference_was_scored() -> None:
    from pipeline.training.engine.trainer import held

    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with held(model):
        model.requires_grad_(True)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
