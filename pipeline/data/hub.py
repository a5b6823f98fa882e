"""Data sets of the Hugging Face hub, and local folders in its layout, as rows: `hf:NAME:SPLIT`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.source_row import SourceRow
from pipeline.data.tables import table_rows

PREFIX = "hf:"
_BATCH = 64


class DatasetError(ValueError):
    """There is no such data set, or it cannot be had."""


class Address(NamedTuple):
    """What `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` says."""

    name: str
    """On the hub, or a folder."""
    config: str | None
    split: str


def is_hub(path: str | Path) -> bool:
    """Whether a data file's path names a data set instead."""
    return str(path).startswith(PREFIX)


def is_cached(link: Path) -> bool:
    """Whether a symbolic link is a file of a snapshot in the hub's cache: a link to a blob."""
    cached = (parent.parent for parent in link.absolute().parents if parent.name == "snapshots")
    return any(link.resolve().is_relative_to((folder / "blobs").resolve()) for folder in cached)


def address(path: str | Path) -> Address:
    """The parts of the name; a split may be cut as `datasets` does it, as in `train[:1000]`.

    Raises:
        DatasetError: it has not two or three parts.
    """
    parts = re.split(r":(?![^\[]*\])", str(path).removeprefix(PREFIX))
    if len(parts) not in (2, 3) or not all(parts):
        raise DatasetError("not `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`")
    return Address(parts[0], parts[1] if len(parts) == 3 else None, parts[-1])


def dataset_rows(path: str | Path) -> Iterator[SourceRow]:
    """The rows of a data set, which have numbers and no lines.

    Raises:
        DatasetError: the data set cannot be loaded.
    """
    wanted = address(path)
    numbers = count()
    for batch in _load(wanted).with_format("arrow").iter(batch_size=_BATCH):
        yield from table_rows(batch, numbers)


def _load(wanted: Address) -> Any:
    import datasets

    try:
        if (Path(wanted.name) / "dataset_info.json").is_file() or (Path(wanted.name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(wanted.name)
            return saved[wanted.split] if isinstance(saved, dict) else saved
        return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split)
    except Exception as error:  # whatever the library, the network and the formats below it raise
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(f"the data set cannot be loaded: {cause}") from error
