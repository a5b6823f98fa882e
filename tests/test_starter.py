"""What `pipeline init DIR` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment_file import load_experiment
from pipeline.starter import write_starter

ROOT = Path(__file__).parent.parent


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_the_repository_byte_for_byte(tmp_path: Path) -> None:
    written = write_starter(tmp_path / "new" / "folder")
    start = tmp_path / "new" / "folder"
    assert {path.relative_to(start).as_posix() for path in written} == files_under(start)
    assert written == sorted(written)
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "datasets" / "triage").iterdir()}
    expected |= {"schemas/experiment.schema.json", ".gitignore"}
    assert files_under(start) == expected
    for name in expected - {".gitignore"}:
        assert (start / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert (start / ".gitignore").read_text() == "/checkpoints/\n/.venv/\n"


def test_the_recipes_work_where_they_were_written(tmp_path: Path) -> None:
    write_starter(tmp_path)
    for recipe in (tmp_path / "recipes").glob("*.yaml"):
        experiment = load_experiment(recipe).experiment
        assert experiment.data.preferences is not None
        assert Path(experiment.data.preferences.train).parent == (tmp_path / "datasets" / "triage").resolve()
        assert Path(experiment.data.preferences.train).is_file()


def test_a_gitignore_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("mine\n")
    written = write_starter(tmp_path)
    assert tmp_path / ".gitignore" not in written
    assert (tmp_path / ".gitignore").read_text() == "mine\n"


def test_nothing_is_written_where_a_file_would_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "triage.yaml").write_text("mine\n")
    (tmp_path / "schemas").write_text("a file where a folder is needed\n")
    with pytest.raises(PipelineError) as caught:
        write_starter(tmp_path)
    assert caught.value.code == "file-exists"
    assert "recipes/triage.yaml" in caught.value.message
    assert "schemas" in caught.value.message
    assert files_under(tmp_path) == {"recipes/triage.yaml", "schemas"}


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(PipelineError) as caught:
        write_starter(tmp_path / "here")
    assert caught.value.code == "file-exists"


def test_a_failure_half_way_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, renamed = Path.rename, []

    def fails_at_the_third(self: Path, target: Path) -> Path:
        if len(renamed) == 2:
            raise OSError(28, "No space left on device", str(target))
        renamed.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_third)
    with pytest.raises(PipelineError) as caught:
        write_starter(tmp_path)
    assert caught.value.code == "not-writable"
    assert caught.value.exit_code is ExitCode.MACHINE
    assert len(renamed) == 2
    assert files_under(tmp_path) == set()
