"""What the cases `dpo` and `partial` share: rows, settings, the sides."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark_cases.frame import BASE, Work, placement

SEED = 7
BATCH = 4
MAX_LENGTH = 384
SHIPPED = Path(__file__).parent.parent.parent / "datasets" / "triage" / "preferences.train.jsonl"


def write_rows(folder: Path, data: Path | None, rows: int) -> tuple[list[dict[str, list[int]]], str]:
    """Tokenises the first `rows` pairs that fit, and whose prompt is about as long as a completion, or longer.

    Returns:
        The pairs, and a line about them.
    """
    from transformers import AutoTokenizer

    from pipeline.data.check import load_rows
    from pipeline.data.tokens import tokenize_pair

    tokenizer = AutoTokenizer.from_pretrained(folder / BASE)
    pairs: list[dict[str, list[int]]] = []
    passed_over = 0
    for row in load_rows(data or SHIPPED, "preference").rows:
        if len(pairs) == rows:
            break
        pair = tokenize_pair(tokenizer, row)
        lengths = [len(ids) for ids in pair]
        if lengths[0] + max(lengths[1:]) <= MAX_LENGTH and lengths[0] >= 0.8 * (lengths[1] + lengths[2]) / 2:
            pairs.append(pair._asdict())
        else:
            passed_over += 1
    (folder / "pairs.json").write_text(json.dumps(pairs))
    counts = [sum(len(pair[name]) for pair in pairs) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    says = (
        f"{len(pairs)} pairs of {(data or SHIPPED).name}: {counts[0]:,} prompt, {counts[1]:,} chosen and "
        f"{counts[2]:,} rejected tokens; {passed_over} pairs "
        f"with shorter prompts or more than {MAX_LENGTH} tokens passed over"
    )
    return pairs, says


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    at = placement()
    return AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=at.dtype).to(at.device)


def count_tokens(pairs: list[dict[str, list[int]]]) -> tuple[int, int, int]:
    """Tokens as TRL lays them out, tokens with the prompt once, and completion tokens."""
    prompts = sum(len(pair["prompt_ids"]) for pair in pairs)
    completions = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return 2 * prompts + completions, prompts + completions, completions


def weights_of_blocks(folder: Path) -> tuple[int, int, int]:
    """Blocks, weights of one, and weights of the head."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / BASE)
    width = config.hidden_size
    keys = config.num_key_value_heads * width // config.num_attention_heads
    block = 2 * width * width + 2 * width * keys + 3 * width * config.intermediate_size
    return config.num_hidden_layers, block, width * config.vocab_size


def train_side(
    folder: Path,
    side: str,
    precision: Any,
    stage: Any,
    opened_rate: float,
    stock: Callable[[], Any],
    own: Callable[[], Any],
) -> dict[str, Any]:
    """Trains one side and records every step.

    Args:
        folder: where `write_rows` wrote.
        side: one of the frame's.
        precision: ours, of float32 products.
        stage: the DPO settings.
        opened_rate: learning rate of opened weights.
        stock: builds TRL's policy.
        own: builds ours.
    """
    import warnings

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOTrainer

    from pipeline.model.device import Placement, reuse_memory
    from pipeline.model.ground import quiet_libraries
    from pipeline.training.arguments import dpo_config
    from pipeline.training.engine.head import compact_head
    from pipeline.training.engine.linear import join_products
    from pipeline.training.engine.norms import join_norms
    from pipeline.training.engine.precision import multiplication
    from pipeline.training.engine.reference import KeptReference, ReferenceStore, reference_key
    from pipeline.training.engine.trainer import PreferenceTrainer

    quiet_libraries()
    warnings.simplefilter("ignore")
    steps: list[dict[str, float]] = []

    class Record(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                steps.append({"loss": logs["loss"], "margin": logs["rewards/margins"]})

    class Stock(DPOTrainer):  # type: ignore[misc]
        """TRL's, on rows that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    rows = Dataset.from_list(json.loads((folder / "pairs.json").read_text()))
    config = dpo_config(stage, output=folder / side, seed=SEED, placement=placement(), evaluates=False)
    config.gradient_checkpointing = config.activation_checkpointing = side == "trl"
    config.precompute_ref_log_probs = side == "trl-tuned"
    tokenizer = AutoTokenizer.from_pretrained(folder / BASE)
    if side == "ours":
        reuse_memory()
    policy = own() if side == "ours" else stock()
    began = time.perf_counter()
    with ExitStack() as stack:
        if side == "ours":
            products = stack.enter_context(multiplication(precision, policy.device))
            stack.enter_context(compact_head(policy.device, rounds=products.round_gradients))
            trainer: Any = PreferenceTrainer(model=policy, args=config, train_dataset=rows, processing_class=tokenizer)
            trainer.opened_learning_rate = opened_rate
            batch = trainer.trial_batch()
            refusal = trainer.share_prompts(batch)
            assert refusal is None, refusal
            join_products(policy, rounds=products.round_gradients)
            join_norms(policy)
            print(trainer.keep_trunk("auto", batch, folder)[0])
            key = reference_key(
                base_sha256="base",
                adapter={"sha256": "start", "config_sha256": "start"},
                placement=Placement(policy.device, policy.dtype),
                quantize="none",
                products=products,
                attention="own",
            )
            store = ReferenceStore(folder / f"references-{time.time_ns()}", key)
            trainer.keep_reference(KeptReference(store, 0.02, print))
            trainer.begins_as_reference = True  # `pipeline dpo` sees the proof's pairs score alike, to the bit
        else:
            trainer = Stock(model=policy, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.add_callback(Record())
        middle = time.perf_counter()
        trainer.train()
        end = time.perf_counter()
    return {"seconds": {"preparation": middle - began, "training": end - middle}, "steps": steps}


def work_of(pairs: list[dict[str, list[int]]], says: str, epochs: int, flops: float) -> Work:
    return Work(len(pairs), epochs * count_tokens(pairs)[0], flops, says)
