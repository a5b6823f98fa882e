"""Twice TRL's batch in less than TRL's memory, as the benchmark's sides train and measure it.

A narrow model with many words and long rows: what TRL's head takes for prompts is nearly all there is. On models of
usual shape `scripts/benchmark.py CASE --same-memory` says how much larger a batch may be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import LLAMA, config_of, save_model

ROOT = Path(__file__).parents[3]
CASES = ("dpo", "sft")
BATCH, WORDS, PROMPT, ANSWER = 2, 16384, 360, 20


def write_rows(folder: Path) -> None:
    """One step of twice the batch, of both kinds."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(3, WORDS, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    prompts = [some(PROMPT) for _ in range(2 * BATCH)]
    pairs = [{"prompt_ids": ids, "chosen_ids": some(ANSWER), "rejected_ids": some(ANSWER)} for ids in prompts]
    rows = [{"input_ids": ids + some(ANSWER), "labels": [-100] * PROMPT + some(ANSWER)} for ids in prompts]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "rows.json").write_text(json.dumps(rows))


def measure(folder: Path) -> None:
    """Forks a process for each side, which begins with what this one has imported, and writes the peaks down."""
    import importlib

    from pipeline.model.device import place
    from pipeline.training.stage import peak_memory

    for name in CASES:
        importlib.import_module(f"pipeline.training.{name}")
        case = importlib.import_module(f"benchmark_cases.{name}")
        for side, batch in (("trl-tuned", BATCH), ("ours", 2 * BATCH)):
            if child := os.fork():
                assert os.waitpid(child, 0)[1] == 0
                continue
            steps = case.train(folder, side, "exact", batch)["steps"]
            assert len(steps) == 2 * BATCH // batch
            (folder / f"{name}-{side}").write_text(str(peak_memory(place("cpu", "float32"))))
            os._exit(0)


@pytest.fixture(scope="module")
def peaks(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each side."""
    folder = tmp_path_factory.mktemp("peaks")
    config = config_of("Llama", tiny_tokenizer, **{**LLAMA, "vocab_size": WORDS, "max_position_embeddings": 512})
    save_model(folder / "base", config, tiny_tokenizer)
    write_rows(folder)
    start = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), start).save_pretrained(folder / "start")
    work = "import sys, tests.training.engine.test_memory as tests; tests.measure(tests.Path(sys.argv[1]))"
    path = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    subprocess.run(
        [sys.executable, "-c", work, str(folder)], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=500
    )
    return folder


@pytest.mark.parametrize("case", CASES)
def test_twice_the_batch_takes_less_memory_than_trl(case: str, peaks: Path) -> None:
    theirs, ours = (int((peaks / f"{case}-{side}").read_text()) for side in ("trl-tuned", "ours"))
    print(f"TRL tuned at {BATCH}: {theirs / 2**20:,.0f} MiB; ours at {2 * BATCH}: {ours / 2**20:,.0f} MiB")
    assert ours < theirs
