"""The base model: where its files are, loading it and its tokenizer, and the hash of its weights.

Only safetensors and GGUF are read; a hub id is fetched once, at the commit that its revision resolves to, and
loaded from the files on the disk like a local folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Model
from pipeline.model.builtin import PREFIX, builtin_model, forget_quantization

if TYPE_CHECKING:
    from pipeline.model.device import Placement

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_SHA256_NAME = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model on this machine."""

    id: str
    """As the experiment names it."""
    folder: Path
    gguf: str | None
    """The file's name in `folder` where the model is a GGUF file."""
    revision: str | None
    """The commit of a hub model."""

    def weight_files(self) -> list[Path]:
        """The files that hold weights, sorted by name."""
        if self.gguf:
            return [self.folder / self.gguf]
        return sorted(self.folder.glob("*.safetensors"))

    def sha256(self) -> str:
        """Hash of the weights: of `name NUL sha256` of every weight file."""
        total = hashlib.sha256()
        for file in self.weight_files():
            total.update(f"{file.name}\0{_file_sha256(file)}\n".encode())
        return total.hexdigest()


def find_base(model: Model, say: Callable[[str], None] | None = None) -> BaseFiles:
    """The files of `model`, downloaded or converted first where need be.

    Args:
        model: the experiment's model section.
        say: told of a conversion.

    Raises:
        PipelineError: there is no such model, revision or wheel, its licence is not accepted, or its weights
            are in no format that is read; the mend says what to type.
    """
    if model.id.startswith(PREFIX):
        return BaseFiles(model.id, builtin_model(model.id, say), None, None)
    path = Path(model.id).expanduser()
    if model.id.endswith(".gguf"):
        if not path.is_file():
            raise _missing(f"there is no file {path}", "check the path: it is relative to the experiment file")
        return BaseFiles(model.id, path.parent, path.name, None)
    if path.is_dir():
        return _with_weights(BaseFiles(model.id, path, None, None))
    if path.is_absolute() or model.id.startswith((".", "~")) or not _HUB_ID.match(model.id):
        raise _missing(f"there is no folder {path}", "check the path: it is relative to the experiment file")
    return _with_weights(_from_hub(model.id, model.revision))


def _missing(message: str, mend: str, code: str = "unknown-model") -> PipelineError:
    return PipelineError(message, code=code, pointer="/model/id", mend=mend)


def _with_weights(files: BaseFiles) -> BaseFiles:
    if not (files.folder / "config.json").is_file():
        raise _missing(f"{files.folder} holds no config.json, so it is no model folder", "name the folder with it")
    if not files.weight_files():
        raise _missing(
            f"{files.id} holds no .safetensors weights (pickle files are never read)",
            "convert it once: load it with Transformers and `save_pretrained` it",
            code="no-safetensors",
        )
    return require_whole(files)


def require_whole(files: BaseFiles) -> BaseFiles:
    """`files`, if the base's weights are held as numbers.

    Raises:
        PipelineError: they were quantised already: what is opened could not be held in float32, and the proof, which
            knows the four bits of `model.quantize` alone, would judge by the wrong tolerance.
    """
    try:
        config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
        method = config["quantization_config"].get("quant_method", "a method that it does not name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return files  # none, or a damaged file, which loading says
    raise _missing(
        f"{files.id} is quantised already (by {method})",
        "name the model that it was made from; `model.quantize: nf4` holds that in four bits",
        code="quantised-base",
    )


def _from_hub(model_id: str, revision: str | None) -> BaseFiles:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(model_id, revision=revision, allow_patterns=_HUB_FILES)
    except GatedRepoError as error:
        raise _missing(
            f"{model_id} asks for its licence to be accepted, and this machine's token has not",
            f"accept it on the page of {model_id}, then `hf auth login`",
            code="licence-not-accepted",
        ) from error
    except RevisionNotFoundError as error:
        raise PipelineError(
            f"{model_id} has no revision `{revision}`",
            code="unknown-revision",
            pointer="/model/revision",
            mend="name a branch, tag or commit of it, or `null` for the newest",
        ) from error
    except RepositoryNotFoundError as error:
        raise _missing(
            f"the hub knows no model {model_id} (or it is private)",
            "check the id; for a private model `hf auth login`; for a local folder write its path with ./ in front",
        ) from error
    except HFValidationError as error:
        raise _missing(
            f"{model_id} is no id of the hub: {error}", "check the id, or write a local path as ./FOLDER"
        ) from error
    except Exception as error:  # of the hub, of the HTTP library below it, or of the disk
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise PipelineError(
                f"{model_id} cannot be kept in the hub's cache: {error.strerror}",
                code="cannot-write",
                file=error.filename,
                mend="free some space, or let HF_HOME name a folder that can be written",
                exit_code=ExitCode.MACHINE,
            ) from error
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        at = f" --revision {revision}" if revision else ""
        raise PipelineError(
            f"{model_id} is neither a local folder nor in the cache, and {offline}",
            code="model-not-cached",
            pointer="/model/id",
            mend=f"with a network: `hf download {model_id}{at}`; or name a local folder with ./ in front",
        ) from error
    # The cache keeps each commit in a folder of its name.
    return BaseFiles(model_id, Path(folder), None, Path(folder).name)


def _file_sha256(file: Path) -> str:
    # The hub's cache links to blobs that are named by their own SHA-256.
    blob = file.resolve().name
    if file.is_symlink() and _SHA256_NAME.match(blob):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def reading(files: BaseFiles) -> AbstractContextManager[None]:
    """What Transformers reads a base's files in: of a GGUF file it does nothing twice."""
    if files.gguf is None:
        return nullcontext()
    from pipeline.model.gguf_file import read_once

    return read_once()


def load_base(files: BaseFiles, model: Model, placement: Placement) -> Any:
    """The base as a Transformers causal language model, on its device.

    Raises:
        PipelineError: the files are damaged or incomplete, are not a causal language model, or need code that was
            not allowed.
    """
    from transformers import AutoModelForCausalLM

    from pipeline.model.precision import keep_gradients

    arguments: dict[str, Any] = {
        "dtype": placement.dtype,
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if model.attn_implementation is not None:
        arguments["attn_implementation"] = model.attn_implementation
    if placement.device.type == "cuda":
        arguments["device_map"] = {"": placement.device}
    if files.gguf:
        arguments["gguf_file"] = files.gguf
    else:
        arguments["use_safetensors"] = True
    if model.quantize == "nf4":
        arguments["quantization_config"] = _nf4()
    try:
        with reading(files):
            loaded, info = AutoModelForCausalLM.from_pretrained(files.folder, **arguments)
    except Exception as error:
        raise _unloadable(files, error) from error
    if info["missing_keys"]:  # Transformers fills them with random numbers, and says so in passing
        missing = sorted(info["missing_keys"])
        raise PipelineError(
            f"the files of {files.id} hold no {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}",
            code="incomplete-model",
            pointer="/model/id",
            mend="name the causal language model itself, not its body or an encoder; or `hf download` it again",
        )
    if files.gguf:
        forget_quantization(loaded)
    if model.quantize == "none":
        loaded.to(placement.device)
    else:
        keep_gradients(loaded)
    # What the adapter's configuration names as its base: the hub id, not this machine's cache.
    loaded.name_or_path = files.id if files.revision else str(files.folder)
    return loaded


def require_bitsandbytes(what: str, pointer: str) -> None:
    """Raises: bitsandbytes, which `what` needs, is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            f"{what} needs bitsandbytes, which is not installed",
            code="missing-package",
            pointer=pointer,
            mend="pip install 'preference-pipeline[quantize]'",
        ) from error


def _nf4() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    require_bitsandbytes("`model.quantize: nf4`", "/model/quantize")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _unloadable(files: BaseFiles, error: Exception) -> PipelineError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return _remote_code(files)
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return PipelineError(
            f"the memory does not hold {files.id}",
            code="out-of-memory",
            pointer="/model/id",
            mend="take a smaller model, `model.dtype: bfloat16`, or `model.quantize: nf4`",
            exit_code=ExitCode.MACHINE,
        )
    return PipelineError(
        f"{files.id} cannot be loaded as a causal language model: {text[:300]}",
        code="unloadable-model",
        pointer="/model/id",
        mend="check that its files are complete; `hf download` it again or name another",
    )


def _remote_code(files: BaseFiles) -> PipelineError:
    return PipelineError(
        f"{files.id} comes with Python code of its own, which is never run unasked",
        code="remote-code",
        pointer="/model/trust_remote_code",
        mend="read that code, then set `model.trust_remote_code: true`, or take another model",
    )


def load_tokenizer(files: BaseFiles, model: Model, chat_template: str | None) -> Any:
    """The model's own tokenizer; its pad token is the eos token where it has none.

    Args:
        files: where it is.
        model: the experiment's model section.
        chat_template: a Jinja file in place of the model's own template.

    Raises:
        PipelineError: it or the chat template cannot be read, it comes with code that was not allowed, or it has no
            eos token.
    """
    from transformers import AutoTokenizer

    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, "local_files_only": True}
    if files.gguf:
        arguments["gguf_file"] = files.gguf
    try:
        with reading(files):
            tokenizer = AutoTokenizer.from_pretrained(files.folder, **arguments)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _remote_code(files) from error
        raise PipelineError(
            f"the tokenizer of {files.id} cannot be read: {' '.join(str(error).split())[:300]}",
            code="unloadable-tokenizer",
            pointer="/model/id",
            mend="check that the folder holds tokenizer.json and tokenizer_config.json",
        ) from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(
                f"the chat template {chat_template} cannot be read: {error}",
                code="no-such-file",
                pointer="/tokenizer/chat_template",
                mend="name a Jinja file in UTF-8, or `null` for the model's own template",
            ) from error
    if tokenizer.eos_token_id is None:
        raise PipelineError(
            f"the tokenizer of {files.id} has no eos token, so no answer could learn to end",
            code="no-eos-token",
            pointer="/model/id",
            mend="set `eos_token` in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what turns text into ids (vocabulary, merges, normaliser, …), without padding, cutting and template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template; None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()
