"""What DPO kept of its reference, in `compare`: believed where it is whole and a sample confirms it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline import cache
from pipeline.data.tokens import Pair
from pipeline.evaluation import compare
from pipeline.evaluation.kept_logps import KeptLogps
from pipeline.evaluation.preference import pair_logps
from pipeline.evaluation.runs import _kept, compare_runs
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import hashes_of
from pipeline.model.device import Placement
from pipeline.runs.run import Run, find_run
from pipeline.training.dpo import run_dpo
from pipeline.training.engine.precision import Products
from pipeline.training.engine.reference import ReferenceStore, keep_evaluated, reference_key, row_digest
from pipeline.training.sft import run_sft

PAIRS = [Pair([1, at], [2, 3], [4]) for at in range(10)]
LOGPS = {row_digest(pair._asdict()): (-1.0 - at, -2.0 * at) for at, pair in enumerate(PAIRS)}


class Scoring:
    """Gives what is kept of each pair, and counts."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.pairs: list[Pair] = []

    def __call__(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        self.pairs += pairs
        chosen, rejected = torch.tensor([LOGPS[row_digest(pair._asdict())] for pair in pairs]).unbind(dim=1)
        return chosen, rejected + self.off


def test_a_sample_is_scored_and_the_rest_is_believed() -> None:
    score = Scoring(off=0.01)
    found = KeptLogps(LOGPS, 0.02).of(PAIRS, score)
    assert found is not None
    assert torch.stack(found, dim=1).tolist() == [list(values) for values in LOGPS.values()]
    assert [pair.prompt_ids[1] for pair in score.pairs] == [0, 2, 5, 7]


def test_few_pairs_are_all_in_the_sample() -> None:
    score = Scoring()
    assert KeptLogps(LOGPS, 0.02).of(PAIRS[:2], score) is not None
    assert score.pairs == PAIRS[:2]


def test_one_pair_that_is_not_kept_and_none_is_believed() -> None:
    score = Scoring()
    assert KeptLogps(LOGPS, 0.02).of([*PAIRS, Pair([1], [2], [3])], score) is None
    assert score.pairs == []


@pytest.mark.parametrize("off", [0.03, -0.03, float("nan")])
def test_what_scores_otherwise_is_not_believed(off: float) -> None:
    assert KeptLogps(LOGPS, 0.02).of(PAIRS, Scoring(off)) is None


def test_only_what_was_scored_as_here_is_found(chat_model: Any, tmp_path: Path) -> None:
    """The very key, in float32, and by a model that scores without padding here as well."""
    get_peft_model(chat_model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    model, products = chat_model, Products("exact", round=False)

    def found(
        dtype: torch.dtype = torch.float32, base: str = "base", quantize: Any = "none", products: Products = products
    ) -> dict[bytes, tuple[float, float]] | None:
        placement = Placement(torch.device("cpu"), dtype)
        kept = _kept(model, placement, base, quantize, products, tmp_path)
        return None if kept is None else kept.logps

    for dtype, quantize in ((torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "nf4")):
        key = reference_key(
            base_sha256="base",
            adapter=hashes_of(tmp_path),
            placement=Placement(torch.device("cpu"), dtype),
            quantize=quantize,
            products=products,
            attention="shared_prompt",
        )
        ReferenceStore(cache.folder_of("references"), key).write(LOGPS)
    assert found() == LOGPS
    assert found(base="other") == {}
    assert found(torch.bfloat16) is None
    assert found(quantize="nf4") is None
    assert found(products=Products("rounded", round=True)) is None
    model.config.sliding_window = 4
    assert found() is None


@pytest.fixture
def runs(write_experiment: Callable[..., Path], tmp_path: Path, tiny_data: dict[str, Path], console: Any) -> Any:
    """An SFT and a DPO run, which kept its reference of eight held-out pairs, and their experiment."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(tiny_data["preferences"].read_text().splitlines(keepends=True)[:8]))
    preferences = {"train": str(tiny_data["preferences"]), "eval": str(held_out)}
    data = {"demonstrations": {"train": str(tiny_data["demonstrations"])}, "preferences": preferences}
    path = write_experiment(
        data=data, sft={"max_steps": 2}, dpo={"max_steps": 2}, evaluation={"max_new_tokens": 2, "regression": False}
    )
    experiment, root = load_experiment(path).experiment, tmp_path / "checkpoints"
    found = [find_run(root, str(stage(experiment, root, console).run)) for stage in (run_sft, run_dpo)]
    return found, experiment, root


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each call scored."""
    counts: list[int] = []

    def counting(model: Any, pairs: Sequence[Pair], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(pairs))
        return pair_logps(model, pairs, **how)

    monkeypatch.setattr(compare, "pair_logps", counting)
    return counts


def test_what_was_evaluated_last_is_kept_of_the_trained_weights(tmp_path: Path) -> None:
    reference, trained = (ReferenceStore(tmp_path, {"of": name}) for name in ("sft", "dpo"))
    reference.write(LOGPS)
    rows = [pair._asdict() for pair in PAIRS[2:5]]
    rewards = torch.tensor([[0.1, -0.2], [0.3, 0.0], [0.0, 0.5]])
    keep_evaluated(trained, LOGPS, rows, rewards, beta=0.1)
    expected = torch.tensor([LOGPS[row_digest(row)] for row in rows]) + torch.tensor([[1.0, -2], [3, 0], [0, 5]])
    found = trained.read()
    assert torch.allclose(torch.tensor([found[row_digest(row)] for row in rows]), expected)
    assert len(found) == 3
    assert reference.read() == LOGPS


def test_nothing_is_kept_where_the_reference_of_a_row_is_not_known(tmp_path: Path) -> None:
    trained = ReferenceStore(tmp_path, {"of": "dpo"})
    stranger = Pair([9], [9], [8])._asdict()
    keep_evaluated(trained, LOGPS, [PAIRS[0]._asdict(), stranger], torch.zeros(2, 2), beta=0.1)
    assert trained.read() == {}


def test_compare_reads_the_reference_that_dpo_kept(runs: Any, scored: list[int], console: Any) -> None:
    (sft, dpo), experiment, root = runs
    assert isinstance(sft, Run)

    def margins() -> list[dict[str, float | None]]:
        scored.clear()
        return [pair.margins for pair in compare_runs([sft, dpo], experiment, root, console).pairs]

    folder = cache.folder_of("references")
    before = sorted((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file())
    kept = margins()
    assert sorted(scored) == [4, 4, 8]  # a sample by the SFT adapter, one by DPO's, and all by the base
    assert sorted((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file()) == before
    assert console.file.getvalue().count("16 preferences") == 3

    config = sft.adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert config.read_text() != text
    margins()
    assert sorted(scored) == [4, 8, 8]  # another adapter, as far as its files tell
    config.write_text(text)
    margins()
    assert sorted(scored) == [4, 4, 8]

    shutil.rmtree(folder)
    all_scored = margins()
    assert scored == [8, 8, 8]
    for one, other in zip(kept, all_scored, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
