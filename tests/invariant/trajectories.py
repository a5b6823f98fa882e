"""The classes of path that the engine takes, one small training for each, as plain values.

`scripts/record_trajectories.py` trains each on stock TRL and writes `trajectories.json`; `test_trajectories.py` trains
each by the real command and holds it to that. Both build model, rows and start from here, by libraries alone: nothing
of the project is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.tiny import LLAMA, config_of, make_tokenizer, save_model

RECORDED = Path(__file__).with_name("trajectories.json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")
SEED = 3
COLOURS = (
    "red",
    "green",
    "blue",
    "white",
    "black",
    "pink",
    "grey",
    "brown",
    "gold",
    "teal",
    "plum",
    "lime",
    "navy",
    "rust",
)
"""One row for each of fourteen: in steps of eight the last one of an epoch is of six."""
RHYTHM: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "max_length": 128,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
}
RATES = {"sft": 5.0e-3, "dpo": 2.0e-3}
"""They train without chaos, so that rounding stays rounding."""
OPENED_RATE = 5.0e-4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A turn ends with its stop token: what a template writes behind it TRL has in SFT's loss, and this project has not."""
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
DEPTH = 4
LONG = 640
WINDOW = 12

_SMALL = {**LLAMA, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
_SMALL |= {"head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "max_position_embeddings": 1024}),
    "mistral": ("Mistral", {**_SMALL, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3Text",
        {**_SMALL, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **_SMALL,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "router_aux_loss_coef": 0.1,
        },
    ),
    "qwen3_5": (
        "Qwen3_5Text",
        {
            **_SMALL,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}
"""Transformers' class and its settings."""
RECURRENT = ("qwen3_5",)
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_BLOCK = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
LAYERS = {
    "qwen3-moe": _ATTENTION,
    "qwen3_5": [*_BLOCK, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"],
}
"""Linear layers of a model's blocks, where they are not Llama's."""


@dataclass(frozen=True)
class Case:
    """One class of path, and the training that takes it."""

    stage: Literal["sft", "dpo"]
    path: dict[str, Any]
    """What `engine` in `run.json` must say, so that the class is the one that is meant."""
    model: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the stage, in TRL's names, beside RHYTHM."""
    layers: Literal["all", "last-half"] = "all"
    """Blocks with LoRA."""
    adapter: Literal["continue", "new", "frozen"] = "continue"
    opened: int = 0
    """Blocks from the top that are opened, the final norm with them, and the head where `head`."""
    head: bool = False
    long: bool = False
    """Prompts of more than 512 tokens, whose attention the engine makes again; some completions are cut at LONG."""
    precision: Literal["exact", "auto"] = "exact"

    @property
    def tolerance(self) -> Literal["exact", "recurrent", "rounded"]:
        """How far the engine may be from the record; `test_trajectories.py` says why."""
        if self.precision != "exact":
            return "rounded"
        return "recurrent" if self.model in RECURRENT else "exact"

    def targets(self) -> list[str]:
        """Linear layers with LoRA."""
        return LAYERS.get(self.model, _BLOCK)

    def blocks(self) -> list[int]:
        """Blocks that carry the start's LoRA."""
        return list(range(DEPTH // 2 if self.layers == "last-half" else 0, DEPTH))


JOINT, PLAIN = {"shared_prompt": True}, {"shared_prompt": False}
PACKED, PADDED = {"padding_free": True}, {"padding_free": False}
CASES: dict[str, Case] = {
    "sft": Case("sft", PACKED),
    "sft-rounded": Case("sft", PACKED, precision="auto"),
    "sft-long": Case("sft", PACKED, long=True, settings={"max_length": LONG, "num_train_epochs": 1}),
    "sft-checkpointed": Case("sft", PACKED, settings={"gradient_checkpointing": True}),
    "sft-opened": Case("sft", PACKED, opened=1, head=True),
    "sft-sliding": Case("sft", PACKED, model="mistral"),
    "sft-two-layer-types": Case("sft", PACKED, model="gemma3"),
    "sft-experts": Case("sft", PACKED, model="qwen3-moe"),
    "sft-padded": Case("sft", PADDED, model="qwen3_5"),
    "dpo": Case("dpo", {**JOINT, "trunk": None}),
    "dpo-rounded": Case("dpo", JOINT, precision="auto"),
    "dpo-long": Case("dpo", JOINT, long=True, settings={"max_length": LONG, "num_train_epochs": 1}),
    "dpo-checkpointed": Case("dpo", JOINT, settings={"gradient_checkpointing": True}),
    "dpo-opened": Case("dpo", JOINT, opened=1, head=True),
    "dpo-trunk-frozen": Case("dpo", {**JOINT, "trunk": 3}, opened=1, adapter="frozen"),
    "dpo-trunk-last-half": Case("dpo", {**JOINT, "trunk": 2}, layers="last-half"),
    "dpo-new-adapter": Case("dpo", JOINT, adapter="new"),
    "dpo-sliding": Case("dpo", JOINT, model="mistral"),
    "dpo-two-layer-types": Case("dpo", JOINT, model="gemma3"),
    "dpo-experts": Case("dpo", JOINT, model="qwen3-moe"),
    "dpo-two-rows": Case("dpo", PLAIN, model="qwen3_5"),
}
"""`dpo` and those of three epochs read the kept reference in two of them."""


def write_rows(file: Path, case: Case) -> list[dict[str, Any]]:
    """The rows of a case, also written as JSON lines: a prompt and its completion, or two of them."""
    rows = [_row(colour, at, case) for at, colour in enumerate(COLOURS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def _row(colour: str, at: int, case: Case) -> dict[str, Any]:
    again = " Look again, please." * (33 + at % 4 if case.long else at % 3)
    more = f" I am sure that it is {colour}." * (2 + at % 4 if case.long else at % 2)
    prompt = [{"role": "user", "content": f"Which light is on? I see {colour}.{again}"}]
    chosen = [{"role": "assistant", "content": f"The {colour} light is on.{more}"}]
    rejected = [{"role": "assistant", "content": f"The {colour} one, soon it will be off."}]
    if case.stage == "sft":
        return {"prompt": prompt, "completion": chosen}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def save_base(folder: Path, case: Case) -> Path:
    """The base of a case, with its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    kind, settings = MODELS[case.model]
    return save_model(folder, config_of(kind, tokenizer, **settings), tokenizer)


def save_start(folder: Path, base: Path, case: Case) -> Path:
    """The adapter that DPO starts from: a LoRA that does something, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lora = {"r": 2, "lora_alpha": 4, "target_modules": case.targets(), "layers_to_transform": case.blocks()}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
