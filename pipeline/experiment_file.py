"""Reading an experiment from its file, and writing it back resolved.

All problems of a file are found in one pass and raised together, each with its line, its JSON pointer and
what to write instead. Nothing here imports torch or TRL: `trl_options.check_options` is the stages' to call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment import Experiment
from pipeline.experiment_problems import placed, problems_of
from pipeline.trl_options import STAGES, refused_options
from pipeline.yaml_places import Document, Place, pointer_to, read_yaml
from pipeline.yaml_scalars import needs_quotes

MAX_BYTES = 256 * 1024
"""The longest experiment that is read: about a second of PyYAML's time."""

_FILES = (
    ("tokenizer", "chat_template"),
    ("data", "demonstrations", "train"),
    ("data", "demonstrations", "eval"),
    ("data", "preferences", "train"),
    ("data", "preferences", "eval"),
    ("evaluation", "prompts"),
    ("evaluation", "output_schema"),
    ("evaluation", "lm_eval", "include_path"),
)


@dataclass(frozen=True)
class LoadedExperiment:
    """An experiment and where it was read from.

    Attributes:
        experiment: its paths are absolute.
        path: the file, as it was named.
    """

    experiment: Experiment
    path: Path
    _places: Mapping[str, Place] = field(default_factory=dict, repr=False, compare=False)

    def place(self, pointer: str) -> int | None:
        """The line, from 1, of the key at a JSON pointer; None where the file does not give it."""
        place = self._places.get(pointer)
        return None if place is None else place.line

    def placed(self, problem: PipelineError) -> PipelineError:
        """`problem` with the file and line that its pointer leads to, or the `--set` that gave the value."""
        return placed(problem, self._places, str(self.path))


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> LoadedExperiment:
    """Reads an experiment, and checks everything that can be checked without opening another file.

    Args:
        path: the YAML file; relative paths in it are relative to its folder.
        overrides: `KEY=VALUE`, e.g. `dpo.beta=0.2`: a dotted key, and YAML for its value. Later ones win;
            relative paths in them are relative to the current directory.

    Raises:
        PipelineErrors: every problem of the file and the overrides, in the order of lines.
    """
    text = _read_text(path)
    try:
        document = read_yaml(text)
        value = _mapping(document)
    except PipelineError as problem:
        problem.file = str(path)
        raise PipelineErrors([problem]) from None
    places, problems = dict(document.places), list(document.problems)
    for override in overrides:
        problems = _apply(override, value, places, problems)
    seen = {problem.pointer for problem in problems}
    _resolve_paths(value, places, path.parent.resolve())
    try:
        experiment = Experiment.model_validate(value)
    except ValidationError as error:
        problems += [problem for problem in problems_of(error, value, places) if problem.pointer not in seen]
    for stage in STAGES:
        section = value.get(stage)
        options = section.get("options") if isinstance(section, dict) else None
        problems += refused_options(stage, options) if isinstance(options, dict) else []
    if problems:
        problems = [placed(problem, places, str(path)) for problem in problems]
        problems.sort(key=lambda problem: (problem.file is None, problem.line or 0))
        raise PipelineErrors(problems)
    return LoadedExperiment(experiment, path, places)


def dump_experiment(experiment: Experiment) -> str:
    """The experiment as YAML, every default written out, that `load_experiment` reads as an equal one."""
    return yaml.dump(
        experiment.model_dump(),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
        default_flow_style=False,
    )


class _Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` reads: no aliases, and quotes wherever a YAML reader would see a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if needs_quotes(text) else None
        if any(separator in text for separator in "\x85\u2028\u2029"):
            style = '"'  # PyYAML would write them unescaped, and read them back as line breaks
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _read_text(path: Path) -> str:
    """The file's text.

    Raises:
        PipelineErrors: where there is no readable file, or it is no text of a sensible size.
    """

    def wrong(cause: str, code: str, mend: str, line: int | None = None) -> PipelineErrors:
        return PipelineErrors([PipelineError(cause, code=code, mend=mend, file=path, line=line)])

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        mend = "check the path; `pipeline init DIR` writes experiments to start from"
        raise wrong("there is no such file", "file-missing", mend) from None
    except IsADirectoryError:
        raise wrong("this is a folder", "not-a-file", "name the experiment's YAML file in it") from None
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}", "file-unreadable", "check its permissions") from None
    if len(content) > MAX_BYTES:
        mend = "name an experiment file; data files go under its `data`"
        raise wrong(f"longer than {MAX_BYTES // 1024} KiB, so no experiment", "too-large", mend)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise wrong("not UTF-8 text", "not-utf8", "save the file as UTF-8", line) from None


def _mapping(document: Document) -> dict[str, Any]:
    if document.value is None and not document.problems:
        mend = "write at least `name:`; `pipeline init DIR` writes experiments to start from"
        raise PipelineError("the experiment is empty", code="empty-file", mend=mend, line=1)
    if not isinstance(document.value, dict):
        raise PipelineError(
            "an experiment is a section of keys, `key: value` on each line",
            code="not-a-mapping",
            mend="is this an experiment file? It starts with `name:`",
            line=document.places[""].line,
        )
    return document.value


def _apply(
    override: str, value: dict[str, Any], places: dict[str, Place], problems: list[PipelineError]
) -> list[PipelineError]:
    """Sets in `value` and `places` what `override` says.

    Returns:
        The problems that are left: those of what it replaces are gone, its own are added.
    """

    def wrong(cause: str, code: str, mend: str) -> list[PipelineError]:
        return [*problems, PipelineError(f"`--set {override}`: {cause}", code=code, mend=mend)]

    dotted, equals, text = override.partition("=")
    path = [key.strip() for key in dotted.split(".")]
    if not equals or not all(path):
        return wrong("not KEY=VALUE", "bad-override", "write a dotted key and a value: --set dpo.beta=0.2")
    try:
        document = read_yaml(text, override=override)
    except PipelineError as error:
        return wrong(error.message, error.code, error.mend)
    section = value
    for depth, key in enumerate(path[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
            places[pointer_to(*path[:depth])] = Place(override=override)
        section = section[key]
        if not isinstance(section, dict):
            cause = f"`{'.'.join(path[:depth])}` holds a value, not keys"
            return wrong(cause, "wrong-type", "set the key itself")
    pointer = pointer_to(*path)
    section[path[-1]] = document.value
    for old in [old for old in places if _within(old, pointer)]:
        del places[old]
    places[pointer] = Place(text="", override=override)
    places.update({pointer + inner: place for inner, place in document.places.items()})
    for problem in document.problems:
        problem.pointer = pointer + (problem.pointer or "")
    return [problem for problem in problems if not _within(problem.pointer, pointer)] + document.problems


def _within(pointer: str | None, section: str) -> bool:
    return pointer is not None and (pointer + "/").startswith(section + "/")


def _resolve_paths(value: dict[str, Any], places: Mapping[str, Place], folder: Path) -> None:
    """Makes the paths in `value` absolute.

    The folder's own links are followed, as opening `folder/../x` would, but not those of the files named: a
    model in a cache is often a link that carries the name.
    """
    for keys in (*_FILES, ("model", "id")):
        section: Any = value
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        text = section.get(keys[-1]) if isinstance(section, dict) else None
        if not isinstance(text, str) or not text:
            continue
        given = places.get(pointer_to(*keys), Place())
        home = os.path.expanduser(text)  # noqa: PTH111 - it leaves the `~` of an unknown user alone
        absolute = os.path.normpath((folder if given.override is None else Path.cwd()) / home)
        if keys[0] in ("data", "evaluation") and text.startswith("hf:"):
            continue  # a data set's name
        if keys != ("model", "id") or _is_local(text, absolute):
            section[keys[-1]] = absolute


def _is_local(model: str, absolute: str) -> bool:
    """Whether a model id names a local path rather than a model of the hub or a built-in one."""
    if model.startswith("builtin:"):
        return False
    return model.startswith((".", "/", "~")) or model.endswith(".gguf") or os.path.isdir(absolute)  # noqa: PTH112
