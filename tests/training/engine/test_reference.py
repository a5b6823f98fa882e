from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import cache
from pipeline.experiment_file import load_experiment
from pipeline.model.device import Placement
from pipeline.training.dpo import run_dpo
from pipeline.training.engine import reference
from pipeline.training.engine.precision import Products
from pipeline.training.engine.reference import ReferenceStore, reference_key, row_digest
from pipeline.training.engine.trainer import PreferenceTrainer, outputs_of
from pipeline.training.keeper import Keeper
from pipeline.training.sft import run_sft

ROW = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
KEY: dict[str, Any] = {
    "base_sha256": "b",
    "adapter": {"sha256": "a", "config_sha256": "c"},
    "placement": Placement(torch.device("cpu"), torch.float32),
    "quantize": "none",
    "products": Products("exact", round=False),
    "attention": "sdpa",
    "ld_alpha": None,
}


def test_a_row_is_named_by_its_ids_and_where_they_are_cut() -> None:
    digests = {
        row_digest(ROW),
        row_digest({**ROW, "prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4, 5]}),
        row_digest({**ROW, "rejected_ids": [4]}),
        row_digest({**ROW, "chosen_ids": [4, 5], "rejected_ids": [3]}),
    }
    assert len(digests) == 4
    assert row_digest({**ROW, "ref_chosen_logps": 1.0}) == row_digest(ROW)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("base_sha256", "other"),
        ("adapter", {"sha256": "other", "config_sha256": "c"}),
        ("adapter", {"sha256": "a", "config_sha256": "other"}),
        ("placement", Placement(torch.device("cpu"), torch.bfloat16)),
        ("placement", Placement(torch.device("cuda"), torch.float32)),
        ("quantize", "nf4"),
        ("products", Products("rounded", round=True)),
        ("attention", "other"),
        ("ld_alpha", 0.5),
    ],
)
def test_each_part_of_the_key_leads_to_another_folder(tmp_path: Path, part: str, other: Any) -> None:
    store = ReferenceStore(tmp_path, reference_key(**KEY))
    store.write({row_digest(ROW): (-1.0, -2.0)})
    assert ReferenceStore(tmp_path, reference_key(**KEY)).read() == {row_digest(ROW): (-1.0, -2.0)}
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
    """Without it TRL scores the reference in every step: the curve is the same."""
    kept, _ = trained()

    def live(trainer: Any, kept: Any) -> None:
        trainer._kept = kept

    monkeypatch.setattr("pipeline.training.engine.trainer.PreferenceTrainer.keep_reference", live)
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


def test_only_what_a_run_comes_to_is_scored(trained: Callable[..., Any]) -> None:
    """Two steps of two pairs, and the held-out pairs: four of the twelve training pairs are scored."""
    _, few = trained(max_steps=2, per_device_train_batch_size=2)
    assert few["scored"] == 4 + 4


def test_until_the_first_step_the_policy_s_own_pass_scores_the_reference(
    trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the reference then, to the bit."""
    scored: list[tuple[int, int]] = []
    stock = PreferenceTrainer.compute_ref_log_probs

    def count(trainer: Any, model: Any, inputs: Any) -> Any:
        scored.append((trainer.state.global_step, len(inputs["input_ids"]) // 2))
        return stock(trainer, model, inputs)

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", count)
    ours, _ = trained()
    proof = 8
    assert sum(rows for step, rows in scored if step == 0) == proof
    scored.clear()
    cache.folder_of("references").rename(cache.folder_of("references").with_name("before"))
    monkeypatch.setattr(PreferenceTrainer, "_is_reference", lambda trainer: False)
    apart, _ = trained()
    assert sum(rows for step, rows in scored if step == 0) == proof + 4 + 4
    for name in ("loss", "rewards/chosen", "rewards/margins", "eval_rewards/margins", "eval_loss"):
        assert ours.metrics[name] == apart.metrics[name], name


def test_a_reference_is_asked_for_log_probabilities_alone(
    trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    stock = PreferenceTrainer.compute_ref_log_probs

    def look(trainer: Any, model: Any, inputs: Any) -> Any:
        with outputs_of(trainer.model) as outputs:
            found = stock(trainer, model, inputs)
        logged.extend(output.entropy for output in outputs)
        return found

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", look)
    trained()
    assert logged
    assert all(entropy is None for entropy in logged)


class Scoring:
    """Counts; a pair's log-probabilities are its first prompt token, and minus it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Any) -> Any:
        self.calls += 1
        first = batch["input_ids"][: len(batch["input_ids"]) // 2, 0].float()
        return first, -first


def batch_of(*firsts: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[first, 1, 2] for first in firsts] + [[first, 3, 0] for first in firsts])
    mask = torch.tensor([[1, 1, 1]] * len(firsts) + [[1, 1, 0]] * len(firsts))
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": torch.tensor([[0, 1, 1]]) * mask}


def test_a_batch_s_rows_are_named_as_the_dataset_s() -> None:
    [digest] = reference._digests(batch_of(7))
    assert digest == row_digest({"prompt_ids": [7], "chosen_ids": [1, 2], "rejected_ids": [3]})


def test_each_row_is_scored_once_and_what_is_kept_is_confirmed_first(tmp_path: Path) -> None:
    store, said, score = ReferenceStore(tmp_path, reference_key(**KEY)), list[str](), Scoring()

    def ask(kept: reference.KeptReference, *firsts: int) -> list[float]:
        batch = batch_of(*firsts)
        return kept.logps(batch, lambda: score(batch))[0].tolist()

    first = reference.KeptReference(store, 0.01, said.append)
    assert ask(first, 1, 2) == [1, 2]
    assert ask(first, 2, 1) == [2, 1]
    assert score.calls == 1
    assert ask(first, 2, 3) == [2, 3]
    assert (score.calls, first.account()) == (2, {"scored": 3, "found": 0})
    assert store.read() == {}
    first.write()
    assert len(store.read()) == 3

    again = reference.KeptReference(store, 0.01, said.append)
    assert ask(again, 1, 2) == [1, 2]
    assert score.calls == 3  # confirmed
    assert ask(again, 3, 1) == [3, 1]
    assert score.calls == 4
    assert ask(again, 3, 1) == [3, 1]
    assert score.calls == 4  # four were
    assert again.account() == {"scored": 0, "found": 3}


def test_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_WRITTEN_AT_LEAST", 4)
    store, score = ReferenceStore(tmp_path, reference_key(**KEY)), Scoring()
    kept = reference.KeptReference(store, 0.01, print)
    for first in range(200):
        kept.logps(batch_of(first), lambda at=first: score(batch_of(at)))  # type: ignore[misc]
    kept.write()
    assert len(store.read()) == 200
    assert len(list(store.folder.glob("*.safetensors"))) < 30


def test_what_was_scored_is_on_the_disk_before_a_checkpoint(
    trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored again after a resume, in another batch, it would differ in the last bits."""
    unwritten: list[int] = []
    save = Keeper.save

    def look(keeper: Any) -> None:
        unwritten.append(len(keeper._trainer._kept._unwritten))
        save(keeper)

    monkeypatch.setattr(Keeper, "save", look)
    trained(save_strategy="steps", save_steps=1)
    assert len(unwritten) >= 3
    assert set(unwritten) == {0}
