"""The adapters that DPO starts from, and what is said of one that does not belong to this base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.errors import PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.model.ground import Ground, prepare_ground
from pipeline.runs.run import Run, create_run, find_run
from pipeline.training.dpo import find_start, run_dpo
from pipeline.training.start import find_adapter, require_same_ground

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def write_foreign(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A random adapter as another tool saves it."""

    def write(name: str = "foreign", adapter: str = "default", base: Path = tiny_folder) -> Path:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=adapter)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def ground_of(write_experiment: Callable[..., Path], console: Any) -> Callable[..., Ground]:
    def make(**changes: Any) -> Ground:
        return prepare_ground(load_experiment(write_experiment(**changes)).experiment, console.print)

    return make


def refusal(name: str, folder: Path, run: Run | None, ground: Ground, quantize: str = "none") -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        require_same_ground(name, folder, run, ground, quantize, print)
    assert caught.value.code == "other-base"
    return caught.value


def test_an_adapter_of_any_name_is_found_in_the_folder_of_its_name(
    write_foreign: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_foreign(adapter="alice")
    assert find_run(tmp_path, "foreign") == folder / "alice"
    assert find_adapter(tmp_path, str(folder)) == (str(folder / "alice"), folder / "alice")
    shutil.copytree(folder / "alice", folder / "bob")
    with pytest.raises(PipelineError, match="holds several adapters: alice, bob"):
        find_run(tmp_path, "foreign")


def test_a_run_that_is_gone_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name))
    with pytest.raises(PipelineError, match="neither a run nor"):
        find_adapter(tmp_path, "lights/sft-001")
    assert asked == []


def test_an_adapter_of_the_hub_is_found_at_its_commit(
    write_foreign: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--lights-lora"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for file in write_foreign().glob("adapter_*"):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name, found = find_adapter(tmp_path / "runs", "org/lights-lora")
    assert (name, found) == (f"org/lights-lora@{COMMIT}", snapshot)
    assert find_adapter(tmp_path / "runs", name) == (name, snapshot)  # as a manifest's `parent` names it
    with pytest.raises(PipelineError, match="HF_HUB_OFFLINE is set") as caught:
        find_adapter(tmp_path / "runs", "org/other-lora")
    assert caught.value.code == "no-such-run"
    assert "`org/other-lora` is neither a run nor a folder" in caught.value.message
    assert "hf download org/other-lora" in caught.value.mend


def test_dpo_starts_from_a_foreign_adapter_of_another_name(
    write_experiment: Callable[..., Path], write_foreign: Callable[..., Path], tmp_path: Path, console: Any
) -> None:
    experiment = load_experiment(
        write_experiment(dpo={"max_steps": 1, "warmup_steps": 0, "save_strategy": "no"})
    ).experiment
    outcome = run_dpo(experiment, tmp_path, console, start=str(write_foreign(adapter="alice")))
    assert outcome.more["reference"]["drift"] == 0.0


def test_what_differs_from_the_run_is_said(
    write_experiment: Callable[..., Path], ground_of: Callable[..., Ground], tmp_path: Path
) -> None:
    ground = ground_of()
    from pipeline.model.base import template_sha256, tokenizer_sha256

    base = {"id": "org/base", "sha256": ground.base_sha256, "quantize": "none"}
    tokenizer = {
        "sha256": tokenizer_sha256(ground.tokenizer),
        "template_sha256": template_sha256(ground.tokenizer),
    }

    def run_with(base: dict[str, Any] = base, tokenizer: dict[str, Any] = tokenizer) -> Run:
        return create_run(tmp_path, "lights", "sft", "name: lights\n", {"base": base, "tokenizer": tokenizer})

    require_same_ground("lights/sft-001", tmp_path, run_with(), ground, "none", print)
    for run, quantize, said, pointer in (
        (run_with({**base, "sha256": "f" * 64}), "none", "base weights differ from what lights/sft-009", "/model"),
        (run_with(), "nf4", "model.quantize differ from what lights/sft-009 was trained on: none then, nf4", "/model"),
        (run_with(tokenizer={**tokenizer, "sha256": "f" * 64}), "none", "the tokenizer differ", "/model"),
        (
            run_with(tokenizer={**tokenizer, "template_sha256": None}),
            "none",
            "the chat template differ from what lights/sft-009 was trained on: none then",
            "/tokenizer/chat_template",
        ),
    ):
        error = refusal("lights/sft-009", tmp_path, run, ground, quantize)
        assert said in error.message
        assert error.pointer == pointer


def test_a_foreign_adapter_of_other_weights_is_refused(
    ground_of: Callable[..., Ground],
    write_foreign: Callable[..., Path],
    tiny_folder: Path,
    tmp_path: Path,
    console: Any,
) -> None:
    """Its configuration names a folder, whose weights can be hashed; a hub id can be compared with a hub id alone."""
    other = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.model.norm.weight[0] += 0.5
    other.save_pretrained(tmp_path / "other")
    folder, ground = write_foreign(base=tmp_path / "other"), ground_of()
    error = refusal("foreign", folder, None, ground)
    assert f"was trained on {tmp_path / 'other'}, whose weights are not those of" in error.message
    assert error.mend == f"set `model.id: {tmp_path / 'other'}`"
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/base"}))
    require_same_ground("foreign", folder, None, ground, "none", console.print)
    assert "foreign names org/base as its base: whether" in console.file.getvalue()
    from dataclasses import replace

    of_hub = replace(ground, files=replace(ground.files, id="org/base-instruct", revision=COMMIT))
    assert (
        "trained on org/base, and the experiment's base is org/base-instruct"
        in refusal("foreign", folder, None, of_hub).message
    )


def test_a_foreign_adapter_with_another_tokenizer_or_template_is_refused(
    ground_of: Callable[..., Ground], write_foreign: Callable[..., Path], tiny_folder: Path
) -> None:
    from transformers import AutoTokenizer

    folder, ground = write_foreign(), ground_of()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    require_same_ground("foreign", folder, None, ground, "none", print)  # padding is the trainer's
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    error = refusal("foreign", folder, None, ground)
    assert error.message == "the chat template beside foreign is not that of this experiment"
    assert error.mend == f"set `tokenizer.chat_template: {folder / 'chat_template.jinja'}`"
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    there, here = len(tokenizer), len(ground.tokenizer)
    assert (
        f"{there} tokens there, {here} here; the first that differs is `<think>`"
        in refusal("foreign", folder, None, ground).message
    )


def test_code_beside_a_foreign_adapter_is_neither_run_nor_asked_about(
    ground_of: Callable[..., Ground], write_foreign: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers asks at the terminal, where it is not told; here somebody says yes."""
    folder, ground = write_foreign(), ground_of()
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    require_same_ground("foreign", folder, None, ground, "none", print)
    assert asked == []
    assert not (folder / "ran").exists()


def test_an_edited_configuration_of_a_run_is_refused(
    write_experiment: Callable[..., Path], tmp_path: Path, console: Any
) -> None:
    from pipeline.training.sft import run_sft

    experiment = load_experiment(write_experiment(sft={"max_steps": 1, "save_strategy": "no"})).experiment
    outcome = run_sft(experiment, tmp_path, console)
    file = outcome.run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 64}))
    with pytest.raises(PipelineError, match=r"SHA-256 of its configuration \(adapter_config.json\) differs") as caught:
        find_start(experiment, tmp_path, None)
    assert caught.value.code == "adapter-changed"
