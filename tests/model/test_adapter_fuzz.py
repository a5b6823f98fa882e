"""Whatever stands in an adapter's folder, opening it gives a message or success: no traceback, no hang, no code run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.experiment import Lora, Unfreeze
from pipeline.model import adapter as adapter_module
from pipeline.model.adapter import attached, hashes_of
from pipeline.model.policy import open_policy

pytestmark = pytest.mark.filterwarnings("ignore")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = (
    *(
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
    ),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "bias", "use_dora", "use_rslora", "lora_bias"),
    *("init_lora_weights", "base_model_name_or_path", "megatron_config", "trainable_token_indices", "auto_mapping"),
    *("target_parameters", "fan_in_fan_out", "loftq_config", "corda_config", "eva_config", "arrow_config"),
    *("layer_replication", "runtime_config", "lora_dropout", "inference_mode"),
)
LIKELY = JSON | st.sampled_from([10**9, -1, "lora_only", "pissa", "(.*)*", "(", ["q_proj"], ["lm_head"], [0], {"a": 1}])
FEW = settings(max_examples=40, deadline=None)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def adapter(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("fuzzed") / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(make_model(), config).save_pretrained(folder)
    return folder


@contextmanager
def spoiled(adapter: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(adapter, Path(folder) / "adapter"))


def opened(make_model: Callable[..., Any], folder: Path) -> str | None:
    """The code of the refusal; None where the adapter is opened, for reading and for training."""
    try:
        hashes_of(adapter_module.require_adapter(folder))
        with attached(make_model(), folder):
            pass
        open_policy(make_model(), folder, Unfreeze(last_blocks=1), lora=Lora(r=2))
    except PipelineError as refused:
        assert refused.mend  # noqa: PT017
        return refused.code
    return None


@FEW
@given(changes=st.dictionaries(st.sampled_from(KEYS), LIKELY, min_size=1, max_size=3))
def test_a_configuration_with_any_values_is_opened_or_refused(
    make_model: Callable[..., Any], adapter: Path, changes: dict[str, Any]
) -> None:
    with spoiled(adapter) as folder:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        opened(make_model, folder)


@FEW
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
def test_a_configuration_that_is_none_is_refused(make_model: Callable[..., Any], adapter: Path, content: bytes) -> None:
    with spoiled(adapter) as folder:
        (folder / "adapter_config.json").write_bytes(content)
        assert opened(make_model, folder) is not None


@FEW
@given(cut=st.integers(0, 3000), at=st.integers(0, 3000), patch=st.binary(max_size=16))
def test_weights_that_are_cut_or_garbled_are_opened_or_refused(
    make_model: Callable[..., Any], adapter: Path, cut: int, at: int, patch: bytes
) -> None:
    with spoiled(adapter) as folder:
        file = folder / "adapter_model.safetensors"
        content = file.read_bytes()
        content = content[: len(content) - cut]
        file.write_bytes(content[:at] + patch + content[at + len(patch) :])
        code = opened(make_model, folder)
        assert code is not None or cut == 0


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_a_pickle_is_never_opened(make_model: Callable[..., Any], adapter: Path, tmp_path: Path, name: str) -> None:
    with spoiled(adapter) as folder:
        (folder / "adapter_model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
        assert opened(make_model, folder) in ("no-adapter", "damaged-adapter")
    with spoiled(adapter) as folder:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
        assert opened(make_model, folder) is None  # the safetensors beside it are what is read
    assert not (tmp_path / "bang").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bang")))
    assert (tmp_path / "bang").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "nowhere", ".", "loop", "/etc/hostname"])
def test_a_link_to_something_else_is_refused(
    make_model: Callable[..., Any], adapter: Path, name: str, target: str
) -> None:
    with spoiled(adapter) as folder:
        (folder / name).unlink()
        (folder / name).symlink_to(name if target == "loop" else target)
        assert opened(make_model, folder) in ("no-adapter", "damaged-adapter")


def test_what_asks_for_all_memory_time_or_code_is_refused(make_model: Callable[..., Any], adapter: Path) -> None:
    for changes, code in (
        ({"r": 10**9}, "adapter-mismatch"),
        ({"rank_pattern": {"q_proj": 10**9}}, "adapter-mismatch"),
        ({"target_modules": "(.|.)*_"}, "adapter-mismatch"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "unsupported-adapter"),
    ):
        with spoiled(adapter) as folder, pytest.MonkeyPatch.context() as patched:
            patched.setattr(adapter_module, "_PATTERN_SECONDS", 0.5)
            file = folder / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
            assert opened(make_model, folder) == code, changes
