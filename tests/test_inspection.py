from __future__ import annotations

import gzip
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


ROWS = [{"prompt": f"Light {number}? ", "completion": "Red."} for number in range(4)]
WRONG = {"prompt": "Light? ", "completion": ""}
LINES = ["", json.dumps(ROWS[0]), json.dumps(WRONG), "", json.dumps(ROWS[1])]
CSV = 'prompt,completion\n"Light\n0? ",Red.\nLight 1? ,Red.\n'


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([WRONG, *ROWS]), path)


@pytest.mark.parametrize(
    ("name", "write", "row", "line", "prompt"),
    [
        ("rows.jsonl", "\n".join(LINES), None, 2, "Light 0? "),
        ("rows.jsonl", "\n".join(LINES), 5, 5, "Light 1? "),
        ("rows.jsonl.gz", gzip.compress("\n".join(LINES).encode()), 5, 5, "Light 1? "),
        ("rows.json", json.dumps([WRONG, *ROWS], indent=1), 3, 10, "Light 1? "),
        ("rows.csv", CSV, 4, 4, "Light 1? "),
        ("rows.parquet", parquet, 5, 5, "Light 3? "),
    ],
)
def test_rows_are_numbered_as_in_the_file(
    write_experiment: Any, tiny_tokenizer: Any, tmp_path: Path, name: str, write: Any, row: Any, line: int, prompt: str
) -> None:
    path = tmp_path / name
    if callable(write):
        write(path)
    else:
        path.write_bytes(write if isinstance(write, bytes) else write.encode())
    given = experiment(write_experiment, data={"demonstrations": {"train": str(path)}})
    (one,) = inspect(given, tiny_tokenizer, "sft", row)
    assert "".join(one.tokens).startswith(prompt)
    assert (one.row, one.line) == (row or 2, line)


def test_a_wrong_row_is_said_to_be_wrong(write_experiment: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES))
    given = experiment(write_experiment, data={"demonstrations": {"train": str(tmp_path / "rows.jsonl")}})
    for row, code in ((3, "empty-content"), (4, "no-such-row"), (1, "no-such-row")):
        with pytest.raises(PipelineError) as caught:
            inspect(given, tiny_tokenizer, "sft", row)
        assert caught.value.code == code
        assert caught.value.line == (3 if row == 3 else None)


def test_the_first_of_several_shards_and_columns_of_other_names(
    write_experiment: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        row = {"q": f"Light {number}? ", "completion": "Red."}
        (tmp_path / "shards" / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    for train, first in ((tmp_path / "shards", 1), (tmp_path / "shards" / "[2-9].jsonl", 2)):
        split = {"train": str(train), "map": {"q": "prompt"}}
        (one,) = inspect(experiment(write_experiment, data={"demonstrations": split}), tiny_tokenizer, "sft", 1)
        assert "".join(one.tokens).startswith(f"Light {first}? ")
        assert Path(one.file).name == f"{first}.jsonl"


def test_a_data_set(write_experiment: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    given = experiment(write_experiment, data={"demonstrations": {"train": f"hf:{tmp_path / 'set'}:train"}})
    (one,) = inspect(given, tiny_tokenizer, "sft", 2)
    assert "".join(one.tokens).startswith("Light 1? ")
