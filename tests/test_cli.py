"""The command as a user meets it: exit codes, one JSON object, messages and never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.runs.run import read_run


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Answer:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Answer(code, captured.out, captured.err)

    return call


def in_a_new_process(*arguments: str) -> set[str]:
    """The modules that a command leaves imported."""
    script = (
        "import sys, runpy\n"
        f"sys.argv = ['pipeline', *{arguments!r}]\n"
        "try:\n    runpy.run_module('pipeline', run_name='__main__')\n"
        "except SystemExit as stop:\n    print('exit', stop.code, file=sys.stderr)\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert "exit 0" in lines
    return set(lines)


@pytest.mark.parametrize("arguments", [["--help"], ["runs"], ["runs", "--sort", "loss"], ["sft", "--help"]])
def test_what_does_not_train_does_not_import_torch(arguments: list[str]) -> None:
    assert not {"torch", "transformers", "datasets", "trl", "wandb"} & in_a_new_process(*arguments)


def test_validate_does_not_import_torch(write_experiment: Any) -> None:
    path = write_experiment()
    modules = in_a_new_process("validate", str(path))
    assert "pipeline.data.check" in modules
    assert not {"torch", "transformers", "datasets", "trl", "wandb"} & modules


def test_align_goes_all_the_way(run: Any, write_experiment: Any, tmp_path: Path) -> None:
    answer = run("align", write_experiment(), "--format", "json")
    assert answer.code == 0
    assert answer.json["runs"] == ["checkpoints/lights/sft-001", "checkpoints/lights/dpo-001"]
    compared = answer.json["compare"]
    assert compared["models"] == ["base", "sft", "dpo"]
    assert set(compared["metrics"]["dpo"]) >= {
        "check/polite",
        "preference_accuracy",
        "preference_margin",
        "perplexity",
        "length_mean",
        "ends_by_itself",
    }
    assert "preference_accuracy" not in compared["metrics"]["base"]
    assert compared["metrics"]["dpo"]["preference_margin"]["value"] > 0
    assert set(compared["metrics"]["sft"]["perplexity"]) == {"value", "low", "high", "n"}
    assert len(compared["samples"]) == 4
    kept = json.loads((tmp_path / "checkpoints/lights/dpo-001/compare.json").read_text())
    assert kept == {key: value for key, value in compared.items() if key != "ok"}
    samples = (tmp_path / "checkpoints/lights/dpo-001/samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in samples] == kept["samples"]
    assert answer.json["stages"]["dpo"]["reference"]["drift"] == 0.0

    page = Path(answer.json["report"]).read_text(encoding="utf-8")
    assert answer.json["report"] == "checkpoints/lights/dpo-001/report.html"
    assert compared["verdict"]["sentence"] in page
    assert run("report", "lights/dpo-001", "--out", "here.html", "--format", "json").json["path"] == "here.html"
    assert Path("here.html").is_file()
    found = run("runs", "diff", "lights/sft-001", "lights/dpo-001", "--format", "json").json
    assert found["runs"] == ["lights/sft-001", "lights/dpo-001"]
    assert found["differences"]["experiment"] == {}
    assert found["differences"]["versions"]["parent"] == [None, "lights/sft-001"]

    again = run("compare", "lights/sft-001", "lights/dpo-001", "--format", "json").json
    assert again["metrics"] == compared["metrics"]
    listed = run("runs", "--format", "json").json["runs"]
    assert [(one["name"], one["status"]) for one in listed] == [
        ("lights/sft-001", "finished"),
        ("lights/dpo-001", "finished"),
    ]


def test_text_output_has_the_table_and_the_trainable_parameters(run: Any, write_experiment: Any) -> None:
    answer = run("align", write_experiment(sft={"max_steps": 2}, dpo={"max_steps": 2}))
    assert answer.code == 0
    for words in ("trainable params:", "step 0: loss 0.6931", "drift 0 nats", "reward margin", "compare.json"):
        assert words in answer.out, words


def test_dpo_before_sft(run: Any, write_experiment: Any) -> None:
    answer = run("dpo", write_experiment())
    assert answer.code == 2
    assert "no finished SFT run" in answer.err
    assert "pipeline sft" in answer.err
    assert not Path("checkpoints").exists()


def test_a_missing_data_file(run: Any, write_experiment: Any) -> None:
    answer = run("sft", write_experiment(data={"demonstrations": {"train": "gone.jsonl"}}))
    assert answer.code == 2
    assert "gone.jsonl" in answer.err
    assert not Path("checkpoints").exists()


def test_a_bad_row_is_refused_before_a_model_is_loaded(
    run: Any, write_experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.training import sft

    bad = tmp_path / "bad.jsonl"
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]}
    wrong = {"messages": [{"role": "user", "content": "hi"}, {"role": "asistant", "content": "hi"}]}
    bad.write_text("".join(json.dumps(row) + "\n" for row in (good, wrong)))
    monkeypatch.setattr(sft, "load_base", lambda *_: pytest.fail("a model was loaded"))
    answer = run("sft", write_experiment(data={"demonstrations": {"train": str(bad)}}), "--format", "json")
    assert answer.code == 1
    errors = answer.json["errors"]
    assert any((one["line"], one["pointer"]) == (2, "/messages/1/role") for one in errors)
    assert not Path("checkpoints").exists()


def test_validate_reports_every_violation(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 1}\n')
    answer = run("validate", file, "--format", "json")
    assert answer.code == 1
    assert (answer.json["ok"], answer.json["rows"], answer.json["valid"]) == (False, 2, 1)
    assert answer.json["kind"] == "preference"
    assert {(error["line"], error["pointer"]) for error in answer.json["errors"]} == {(2, "/chosen"), (2, "")}
    for error in answer.json["errors"]:
        assert {"file", "line", "pointer", "code", "message", "severity"} <= set(error)


def test_validate_an_experiment_checks_all_its_files(run: Any, write_experiment: Any) -> None:
    answer = run("validate", write_experiment(), "--format", "json")
    assert (answer.code, answer.json["ok"]) == (0, True)
    assert len(answer.json["files"]) == 4


def test_a_misspelt_key(run: Any, write_experiment: Any) -> None:
    path = write_experiment(dpo={"bata": 0.2})
    answer = run("dpo", path)
    assert answer.code == 2
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "bata" in text)
    assert f"{path}:{line}" in answer.err
    assert "did you mean `beta`" in answer.err


def test_an_unknown_model(run: Any, write_experiment: Any) -> None:
    answer = run("sft", write_experiment(model={"id": "./no/such/folder"}))
    assert answer.code == 2
    assert "no/such/folder" in answer.err
    assert not Path("checkpoints").exists()
    answer = run("sft", write_experiment(model={"id": "someone/some-model"}))
    assert answer.code == 2
    assert "hf download someone/some-model" in answer.err


def test_an_option_of_trl_is_checked_before_anything_is_loaded(run: Any, write_experiment: Any) -> None:
    path = write_experiment(sft={"options": {"adam_beta_1": 0.8}})
    answer = run("sft", path)
    assert answer.code == 2
    assert "adam_beta1" in answer.err
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "adam_beta_1" in text)
    assert f"{path}:{line}" in answer.err


def test_set_overrides(run: Any, write_experiment: Any, tmp_path: Path) -> None:
    answer = run("sft", write_experiment(), "--set", "sft.max_steps=1", "--set", "name=other", "--format", "json")
    assert answer.code == 0
    folder = Path(answer.json["run"])
    assert folder == Path("checkpoints/other/sft-001")
    assert read_run(folder).manifest["metrics"]["loss"] > 0


def test_compare_of_nothing_finished(run: Any, write_experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import sft

    monkeypatch.setattr(sft._Trainer, "training_step", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert run("sft", write_experiment()).code == 4
    answer = run("compare", "lights/sft-001")
    assert answer.code == 2
    assert "is failed" in answer.err
    assert run("compare", "nothing").code == 2


def test_wrong_usage_is_exit_code_2(run: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2


def test_a_defect_is_one_line_unless_debugged(run: Any, write_experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import sft

    monkeypatch.setattr(sft, "load_base", lambda *_: 1 / 0)
    answer = run("sft", write_experiment())
    assert answer.code == 1
    assert "ZeroDivisionError" in answer.err
    with pytest.raises(ZeroDivisionError):
        main(["sft", str(write_experiment()), "--debug"])


def test_init_then_validate(run: Any) -> None:
    answer = run("init", "here", "--format", "json")
    assert answer.code == 0
    assert "here/recipes/triage.yaml" in answer.json["files"]
    assert run("validate", "here/recipes/triage.yaml").code == 0
    assert run("init", "here").code == 2


def test_plan(run: Any, write_experiment: Any) -> None:
    answer = run("plan", write_experiment(), "--format", "json")
    assert answer.code == 0
    assert answer.json["steps"] == 12  # 12 rows, batch 4, 4 epochs
    assert answer.json["stages"]["dpo"]["steps"] == 6
    for key in ("trainable_parameters", "all_parameters", "trainable_percent", "groups", "modules", "memory_bytes"):
        assert key in answer.json, key
    assert not Path("checkpoints").exists()


def test_inspect(run: Any, write_experiment: Any) -> None:
    answer = run("inspect", write_experiment(), "--stage", "sft", "--format", "json")
    assert answer.code == 0
    (example,) = answer.json["examples"]
    assert len(example["tokens"]) == len(example["ids"]) == len(example["mask"])
    assert 0 < sum(example["mask"]) < len(example["mask"])


def test_convert(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"instruction": "Say hi.", "input": "", "output": "Hi."}]))
    assert run("convert", source, "out.jsonl", "--to", "demonstration").code == 0
    (row,) = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert run("convert", source, "out.jsonl", "--to", "demonstration").code == 2


def test_verify(run: Any, write_experiment: Any) -> None:
    experiment = write_experiment(sft={"max_steps": 2}, dpo={"max_steps": 3})
    assert run("sft", experiment).code == 0
    assert run("dpo", experiment).code == 0
    answer = run("verify", "lights/dpo-001", "--format", "json")
    assert (answer.code, answer.json["ok"]) == (0, True)
    weights = Path("checkpoints/lights/dpo-001/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    answer = run("verify", "lights/dpo-001", "--format", "json")
    assert (answer.code, answer.json["ok"]) == (1, False)


def logps_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits.log_softmax(dim=-1)


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*")
def test_merge(run: Any, write_experiment: Any, tiny_folder: Path) -> None:
    """SFT opened the tied head beside LoRA; the merged folder needs neither PEFT nor this project."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    short = {"max_steps": 2, "warmup_steps": 0, "save_strategy": "no", "eval_strategy": "no"}
    experiment = write_experiment(sft={**short, "unfreeze": {"lm_head": True, "learning_rate": 1.0e-2}})
    assert run("sft", experiment).code == 0
    answer = run("merge", "lights/sft-001", "out/merged", "--format", "json")
    assert answer.code == 0
    assert answer.json["ok"] is True
    assert answer.json["path"] == "out/merged"
    assert answer.json["tolerance"] == 0.01
    assert answer.json["difference"] <= answer.json["tolerance"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    untrained = logps_of(base)
    trained = logps_of(PeftModel.from_pretrained(base, "checkpoints/lights/sft-001/adapter"))
    merged = logps_of(AutoModelForCausalLM.from_pretrained("out/merged"))
    assert (merged - trained).abs().max() <= answer.json["tolerance"]
    assert (merged - untrained).abs().max() > 10 * answer.json["tolerance"]
    assert "nats from the adapter on its base" in run("merge", "lights/sft-001", "again").out

    # What stands there already is left alone.
    before = {file.name: file.stat().st_mtime_ns for file in Path("out/merged").iterdir()}
    answer = run("merge", "lights/sft-001", "out/merged", "--format", "json")
    assert (answer.code, answer.json["errors"][0]["code"]) == (2, "out-exists")
    assert {file.name: file.stat().st_mtime_ns for file in Path("out/merged").iterdir()} == before
    read_run(Path("checkpoints/lights/sft-001")).end("interrupted")
    answer = run("merge", "lights/sft-001", "other")
    assert answer.code == 2
    assert "lights/sft-001 is interrupted, so it left no adapter to merge" in answer.err
    assert not Path("other").exists()


def test_merge_into_a_base_that_is_quantised_already(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing could be added to packed weights: neither a merged model nor a word of it is left behind."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    packed = tmp_path / "packed"
    shutil.copytree(tiny_folder, packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(packed)
    model.save_pretrained(tmp_path / "adapter")
    answer = run("merge", tmp_path / "adapter", "out")
    assert answer.code == 2
    assert f"{packed} is quantised already (by gptq)" in answer.err
    assert "name the model that it was made from" in answer.err
    assert not Path("out").exists()
