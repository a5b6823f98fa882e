"""`pipeline merge`: an adapter folded into its base and saved as a plain model, checked before it is kept.

A head that was tied to the embeddings and opened is a matrix of its own in the merged model, and its configuration
says so. A base that trained in four bits is merged as those four bits compute, not as the weights that they came from.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Experiment, Model
from pipeline.experiment_file import load_experiment
from pipeline.model.adapter import attached, load_adapter, read_config
from pipeline.model.base import load_base
from pipeline.model.builtin import forget_quantization
from pipeline.model.ground import prepare_ground, quiet_libraries
from pipeline.model.precision import dequantize, is_quantized
from pipeline.training.start import find_adapter

_TOKENS = 64
"""Length of each of the two rows of ids that both models are compared on."""


@dataclass(frozen=True)
class Merged:
    """What was written, and how far it is from the adapter on its base."""

    path: Path
    dtype: str
    apart: float
    """Nats, of the next token's log-probabilities: the largest difference in float32, the mean in half precision."""
    allowed: float
    tied_head: bool
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """For `--format json`."""
        return {
            "path": str(self.path),
            "dtype": self.dtype,
            "difference": self.apart,
            "tolerance": self.allowed,
            "tied_head": self.tied_head,
            "parameters": self.parameters,
        }


def merge_named(root: Path, name: str, out: Path, dtype: str | None, say: Callable[[str], None]) -> Merged:
    """`merge` for what a user names.

    Args:
        root: where runs live.
        name: a run, an adapter folder or an adapter's hub id.
        out: a new folder.
        dtype: precision of the merged model; None: the run's.
        say: told what goes on.

    Raises:
        PipelineError: as `merge`; or there is no such adapter, its run did not finish, or no base is named for it.
    """
    _, found = find_adapter(root, name)
    if isinstance(found, Path):
        adapter, experiment = found, Experiment(name="merge", model=Model(id=_named_base(found)))
    else:
        if found.status != "finished":
            raise PipelineError(
                f"{found.name} is {found.status}, so it left no adapter to merge",
                code="no-finished-run",
                file=found.path,
                mend="name a finished run",
            )
        adapter, experiment = found.adapter, load_experiment(found.path / "experiment.yaml").experiment
    if dtype is not None:
        model = experiment.model.model_copy(update={"dtype": dtype})
        experiment = experiment.model_copy(update={"model": model})
    return merge(adapter, experiment, out, say)


def _named_base(adapter: Path) -> str:
    base = read_config(adapter).base_model_name_or_path
    if not base:
        raise PipelineError(
            f"{adapter} does not say which base it is for",
            code="no-base",
            file=adapter,
            mend="write the base's id or folder into adapter_config.json, as `base_model_name_or_path`",
        )
    return str(base)


def merge(adapter: Path, experiment: Experiment, out: Path, say: Callable[[str], None]) -> Merged:
    """Writes the merged model and its tokenizer into `out`, whole or not at all.

    Args:
        adapter: a PEFT adapter.
        experiment: what it was trained in: base, precision, chat template.
        out: a folder that does not exist, or is empty.
        say: told what goes on.

    Raises:
        PipelineError: `out` holds something, base or adapter are not to be had, or what was written does not compute
            what the adapter on its base computes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(
            f"{out} is there already, and is not an empty folder",
            code="out-exists",
            file=out,
            mend="name a new folder",
        )
    quiet_libraries()
    ground = prepare_ground(experiment, say)
    placement = ground.placement
    base = load_base(ground.files, experiment.model, placement)
    if is_quantized(base):
        dequantize(base, [""])
        forget_quantization(base)
        base.to(placement.dtype)
    ids = _ids(base.config.get_text_config().vocab_size, placement.device)
    with attached(base, adapter) as model:
        expected = _logps(model, ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = load_adapter(base, adapter, is_trainable=False).merge_and_unload(safe_merge=True)
    # What is opened is held in float32; a saved model has one precision.
    merged.to(placement.dtype)
    parameters, tied = sum(one.numel() for one in merged.parameters()), bool(merged.config.tie_word_embeddings)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        merged.save_pretrained(staged)
        ground.tokenizer.save_pretrained(staged)
        del merged, base, model
        again = load_base(replace(ground.files, folder=staged, gguf=None), _plain(experiment.model), placement)
        apart, allowed = _difference(_logps(again.eval(), ids), expected, placement.dtype)
        if not apart <= allowed:
            raise PipelineError(
                f"the merged model is {apart:.3g} nats off the adapter on its base (allowed {allowed:g}), and not kept",
                code="merged-differs",
                mend="use --dtype float32, or the adapter itself",
                exit_code=ExitCode.WRONG,
            )
        staged.chmod(0o755)
        if out.exists():
            out.rmdir()
        staged.rename(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(staged)
    return Merged(out, str(placement.dtype).removeprefix("torch."), apart, allowed, tied, parameters)


def _plain(model: Model) -> Model:
    return model.model_copy(update={"quantize": "none"})


def _ids(vocabulary: int, device: torch.device) -> torch.Tensor:
    """Two rows of token ids, `[2, 64]`, the same on every machine."""
    steps = torch.arange(2 * _TOKENS).view(2, _TOKENS)
    return ((steps * 7919 + 13) % vocabulary).to(device)


def _logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token at each position, `[2, 64, V]`."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().log_softmax(dim=-1).cpu()


def _difference(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """How far apart, and how far is rounding: at most 0.01 nats in float32, 0.1 in the mean in half precision."""
    apart = (found - expected).abs()
    return (float(apart.max()), 0.01) if dtype == torch.float32 else (float(apart.mean()), 0.1)


def _unwritable(out: Path, error: OSError) -> PipelineError:
    return PipelineError(
        f"the merged model cannot be written: {error.strerror or error}",
        code="cannot-write",
        file=out,
        mend="free some space, or name another folder",
        exit_code=ExitCode.MACHINE,
    )
