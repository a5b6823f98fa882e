from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.runs.lock import is_locked, locked


def test_a_second_writer_is_refused_by_the_first_ones_number(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(PipelineError) as caught, locked(tmp_path):
            pass
    assert caught.value.code == "run-locked"
    assert f"process {os.getpid()}" in caught.value.message
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        locked(tmp_path).__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_a_folder_without_a_lock_file_is_not_locked(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not list(tmp_path.iterdir())
