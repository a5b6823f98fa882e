"""How `pipeline compare` puts an adapter on the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.evaluation.runs import _adapted


def test_a_version_is_computed_with_the_sum_of_weights(tiny_folder: Path, tmp_path: Path, summed: list[Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path)
    with _adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path) as policy, torch.no_grad():
        policy.eval()(input_ids=torch.tensor([[5, 6]]))
        assert len(summed) == len([name for name, _ in policy.named_modules() if name.endswith("lora_A")])
