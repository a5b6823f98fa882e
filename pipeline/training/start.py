"""Where DPO starts: an adapter that a user names, and whether it belongs to this base, tokenizer and template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.model.adapter import read_config
from pipeline.model.base import BaseFiles, template_sha256, tokenizer_sha256
from pipeline.model.ground import Ground, Say
from pipeline.runs.files import ADAPTER_CONFIG
from pipeline.runs.run import Run, find_run, is_run_name

_HUB_ID = re.compile(r"^(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_HUB_FILES = ["adapter_*", "*/adapter_*", "tokenizer*", "special_tokens_map.json", "*.jinja"]


def find_adapter(root: Path, name: str) -> tuple[str, Run | Path]:
    """The run, adapter folder or adapter of the hub that a user names.

    Args:
        root: where runs live.
        name: a folder, `<experiment>/<stage>-001` under `root`, or a hub id, with `@REVISION` behind it or not.

    Returns:
        Its name, under which it is found again (a hub id with its commit), and what it is.

    Raises:
        PipelineError: it is none of these.
    """
    try:
        found = find_run(root, name)
    except PipelineError as error:
        hub = _HUB_ID.match(name)
        # A run that is gone is not looked for on the hub: whoever names one asks nothing of the network.
        named_here = is_run_name(name) or Path(name).exists() or (root / name).exists()
        if error.code != "no-such-run" or hub is None or named_here:
            raise
        return _from_hub(name, hub["id"], hub["revision"], error)
    return (found.name if isinstance(found, Run) else str(found)), found


def _from_hub(name: str, hub_id: str, revision: str | None, missing: PipelineError) -> tuple[str, Path]:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # of the hub, of the HTTP library below it, or of the disk
        why = "it is not in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error)
        raise PipelineError(
            f"{missing.message}; as a hub id: {' '.join(why.split())[:300]}",
            code="no-such-run",
            mend=f"{missing.mend}; for the hub: `hf download {hub_id}`, after `hf auth login` where it is private",
        ) from error
    found = find_run(folder, str(folder))
    assert isinstance(found, Path)
    return f"{hub_id}@{folder.name}", found


def require_same_ground(name: str, folder: Path, run: Run | None, ground: Ground, quantize: str, say: Say) -> None:
    """Base, tokenizer and chat template must be those that the adapter was trained on: they are part of the reference.

    Args:
        name: of the start.
        folder: its adapter.
        run: the run that wrote it; None: a foreign one, of which the adapter's own files tell.
        ground: what DPO stands on.
        quantize: of the experiment's model.
        say: told what cannot be compared.

    Raises:
        PipelineError: one of them differs; says which, and how.
    """
    if run is None:
        _require_named_base(name, folder, ground, say)
        _require_saved_tokenizer(name, folder, ground)
        return
    base, tokenizer = run.manifest["base"], run.manifest["tokenizer"]
    ours = tokenizer_sha256(ground.tokenizer)
    for what, then, this, pointer, mend in (
        ("base weights", base["sha256"], ground.base_sha256, "/model", f"`model.id: {base['id']}`, as it was then"),
        ("model.quantize", base["quantize"], quantize, "/model", f"`model.quantize: {base['quantize']}`"),
        ("tokenizer", tokenizer.get("sha256", ours), ours, "/model", "its tokenizer files"),
        (
            "chat template",
            tokenizer["template_sha256"],
            template_sha256(ground.tokenizer),
            "/tokenizer/chat_template",
            f"that of {folder}",
        ),
    ):
        if then != this:
            raise _differs(
                f"the {what} differ from what {name} was trained on: {_short(then)} then, {_short(this)} now",
                pointer,
                f"use {mend}, or train SFT again",
            )


def _require_named_base(name: str, folder: Path, ground: Ground, say: Say) -> None:
    """A foreign adapter names its base: by a folder whose weights can be hashed, or by a hub id."""
    named = read_config(folder).base_model_name_or_path
    if not named or named in (ground.files.id, str(ground.files.folder)):
        return
    theirs = BaseFiles(named, Path(named), None, None)
    if theirs.weight_files():
        if theirs.sha256() != ground.base_sha256:
            raise _differs(
                f"{name} was trained on {named}, whose weights are not those of {ground.files.id}",
                "/model/id",
                f"set `model.id: {named}`",
            )
    elif ground.files.revision is not None and not Path(named).is_absolute():
        raise _differs(
            f"{name} was trained on {named}, and the experiment's base is {ground.files.id}",
            "/model/id",
            f"set `model.id: {named}`; if both are the same weights, write `{ground.files.id}` into {ADAPTER_CONFIG}",
        )
    else:
        say(f"{name} names {named} as its base: whether {ground.files.id} is the same cannot be told")


def _require_saved_tokenizer(name: str, folder: Path, ground: Ground) -> None:
    """A tokenizer that lies beside a foreign adapter is the one that it was trained with."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        # Left out, the last one has Transformers ask at the terminal whether the folder's code may run.
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # of whatever library wrote it: then there is nothing to compare
        return
    if tokenizer_sha256(theirs) != tokenizer_sha256(ground.tokenizer):
        raise _differs(
            f"the tokenizer beside {name} is not that of {ground.files.id}: {_how(theirs, ground.tokenizer)}",
            "/model/id",
            "use the base and tokenizer that the adapter was trained with",
        )
    template = folder / "chat_template.jinja"
    if theirs.chat_template is not None and theirs.chat_template != ground.tokenizer.chat_template:
        where = f"set `tokenizer.chat_template: {template}`" if template.is_file() else "use its chat template"
        raise _differs(f"the chat template beside {name} is not that of this experiment", "/tokenizer", where)


def _how(theirs: Any, ours: Any) -> str:
    """How two tokenizers differ, by their vocabularies."""
    then, now = theirs.get_vocab(), ours.get_vocab()
    apart = sorted(then.items() ^ now.items(), key=lambda item: item[1])
    if not apart:
        return "the same vocabulary, cut or normalised otherwise"
    return f"{len(then):,} tokens there, {len(now):,} here; the first that differs is `{apart[0][0]}`"


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


def _differs(message: str, pointer: str, mend: str) -> PipelineError:
    return PipelineError(message, code="other-base", pointer=pointer, mend=mend)
