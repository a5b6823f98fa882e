"""What Transformers' loader of GGUF files does over and over is done once.

It parses the file for the configuration, for the weights and for the tokenizer, tens of thousands of tokens and merges
one by one; and it makes the table of an architecture's names for every module of the model (Transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import gguf
import numpy as np
from transformers.utils import logging


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The same on a plain array: slices of numpy's memmap, some for each token, take three times as long."""

    @property
    def data(self) -> Any:
        """The file's bytes, mapped."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


@contextmanager
def read_once() -> Iterator[None]:
    """While open, Transformers parses a GGUF file once, makes its table of names once, and draws no bars.

    What was parsed stays in memory until the end.
    """
    try:
        from transformers import modeling_gguf_pytorch_utils as loader
    except ImportError:  # its successor, which some architectures have, does none of this
        yield
        return
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    before = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(_Reader), cache(gguf.get_tensor_name_map)
    loader.tqdm = partial(loader.tqdm, disable=True)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm = before
        if drawn:
            logging.enable_progress_bar()
