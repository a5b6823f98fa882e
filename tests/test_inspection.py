from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.inspection import inspect, print_examples


def experiment(write_experiment: Any, **changes: Any) -> Any:
    return load_experiment(write_experiment(**changes)).experiment


def shown(examples: Any, tokenizer: Any, **how: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_examples(examples, console, tokenizer, **how)
    return console.file.getvalue()


def test_every_stage_and_side(write_experiment: Any, tiny_tokenizer: Any) -> None:
    examples = inspect(experiment(write_experiment), tiny_tokenizer, row=1)
    assert [(one.stage, one.side) for one in examples] == [("sft", None), ("dpo", "chosen"), ("dpo", "rejected")]
    for one in examples:
        assert len(one.tokens) == len(one.ids) == len(one.mask) == len(one.origin)
        assert "".join(one.tokens) == tiny_tokenizer.decode(one.ids)
        json.dumps(one.as_dict())
    sft, chosen, _ = examples
    in_loss = "".join(token for token, inside in zip(sft.tokens, sft.mask, strict=True) if inside)
    assert in_loss == "The red light is on.<|im_end|>Still red.<|im_end|>"
    written = "".join(token for token, of in zip(chosen.tokens, chosen.origin, strict=True) if of == "content")
    assert written == "Which light is on? I see red.The red light is on."


def test_where_the_row_is_cut(write_experiment: Any, tiny_tokenizer: Any) -> None:
    given = experiment(write_experiment, dpo={"max_length": 30})
    whole = inspect(experiment(write_experiment), tiny_tokenizer, "dpo")[0]
    cut = inspect(given, tiny_tokenizer, "dpo")[0]
    assert cut.ids + cut.cut_ids == whole.ids
    assert len(cut.ids) == 30
    assert cut.as_dict()["truncated"]
    assert "cut at max_length 30" in shown([cut], tiny_tokenizer)
    assert any(finding["code"] in ("completion-cut", "nothing-in-loss") for finding in cut.findings)


def test_without_colours_the_loss_stands_in_brackets(write_experiment: Any, tiny_tokenizer: Any) -> None:
    examples = inspect(experiment(write_experiment), tiny_tokenizer, "sft")
    text = shown(examples, tiny_tokenizer)
    assert "⟦The red light is on.<|im_end|>⟧" in text
    lines = shown(examples, tiny_tokenizer, with_ids=True).splitlines()
    assert any(
        line.split()[1:3] == [str(tiny_tokenizer.eos_token_id), "loss"] for line in lines if "<|im_end|>" in line
    )


def test_plain_text_and_the_eos_token_behind_it(write_experiment: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"prompt": "Which light? ", "completion": "Red."}\n')
    given = experiment(write_experiment, data={"demonstrations": {"train": str(file)}})
    (one,) = inspect(given, tiny_tokenizer, "sft")
    assert (one.tokens[-1], one.mask[-1], one.origin[-1]) == ("<|im_end|>", 1, "template")
    assert set(one.origin[:-1]) == {"content"}


@pytest.mark.parametrize("row", [0, 13])
def test_no_such_row(write_experiment: Any, tiny_tokenizer: Any, row: int) -> None:
    with pytest.raises(PipelineError) as caught:
        inspect(experiment(write_experiment), tiny_tokenizer, "sft", row)
    assert caught.value.code == "no-such-row"


def test_no_such_data(write_experiment: Any, tiny_tokenizer: Any) -> None:
    given = experiment(write_experiment, data={"preferences": None})
    with pytest.raises(PipelineError) as caught:
        inspect(given, tiny_tokenizer, "dpo")
    assert caught.value.pointer == "/data/preferences"
