from __future__ import annotations

import errno
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ExitCode, PipelineError
from pipeline.runs import run as run_module
from pipeline.runs.run import Run, create_run, find_run, list_runs, newest_finished, now, read_run, require_run


def create(root: Path, stage: str = "sft", experiment: str = "triage", **manifest: Any) -> Run:
    return create_run(root, experiment, stage, "name: triage\n", manifest)  # type: ignore[arg-type]


def write_manifest(root: Path, name: str, content: str | dict[str, Any]) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_foreign_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()
    return folder


# Creating


def test_a_new_run_is_a_folder_with_manifest_and_experiment(tmp_path: Path) -> None:
    run = create(tmp_path / "checkpoints", seed=3)
    assert run.path == tmp_path / "checkpoints" / "triage" / "sft-001"
    assert (run.name, run.stage, run.status) == ("triage/sft-001", "sft", "running")
    assert (run.path / "experiment.yaml").read_text() == "name: triage\n"
    written = json.loads((run.path / "run.json").read_text())
    assert written == run.manifest
    assert datetime.fromisoformat(written.pop("start")).utcoffset() == timedelta(0)
    assert written == {"stage": "sft", "status": "running", "experiment": "triage", "end": None, "seed": 3}
    assert (run.adapter, run.metrics_file) == (run.path / "adapter", run.path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("there", "stage", "expected"),
    [
        ([], "dpo", "dpo-001"),
        (["sft-001", "sft-002"], "sft", "sft-003"),
        (["sft-001", "sft-007"], "sft", "sft-008"),
        (["sft-007"], "dpo", "dpo-001"),
        (["sft-999"], "sft", "sft-1000"),
        (["sft-999", "sft-1000"], "sft", "sft-1001"),
        (["sft-9", "sft-x", "old-sft-005", "sft-005-old"], "sft", "sft-001"),
    ],
)
def test_runs_are_numbered_after_the_highest_of_their_stage(
    tmp_path: Path, there: list[str], stage: str, expected: str
) -> None:
    for name in there:
        (tmp_path / "triage" / name).mkdir(parents=True)
    assert create(tmp_path, stage).path.name == expected


def test_a_file_with_the_name_of_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "triage").mkdir()
    (tmp_path / "triage" / "sft-001").write_text("notes")
    assert create(tmp_path).path.name == "sft-002"
    assert (tmp_path / "triage" / "sft-001").read_text() == "notes"


def test_a_run_that_another_process_begins_in_between_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears after the folders were listed, and before ours is made."""
    theirs = tmp_path / "triage" / "sft-001"
    mkdir = Path.mkdir

    def interfere(path: Path, *arguments: Any, **settings: Any) -> None:
        if path == theirs:
            mkdir(path)
            (path / "run.json").write_text("theirs")
        mkdir(path, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", interfere)
        run = create(tmp_path)
    assert run.path.name == "sft-002"
    assert (theirs / "run.json").read_text() == "theirs"
    assert json.loads((run.path / "run.json").read_text())["status"] == "running"


def test_processes_that_begin_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        begun = [pool.submit(create_run, tmp_path, "triage", "sft", "", {"number": number}) for number in range(8)]
        runs = [future.result() for future in begun]
    assert sorted(run.path.name for run in runs) == [f"sft-{number:03d}" for number in range(1, 9)]
    assert all(read_run(run.path).manifest["number"] == run.manifest["number"] for run in runs)


@pytest.mark.parametrize("place", ["", "triage"], ids=["root", "experiment"])
def test_a_file_in_the_way_is_the_machines_failure(tmp_path: Path, place: str) -> None:
    root = tmp_path / "checkpoints"
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text("in the way")
    with pytest.raises(PipelineError) as caught:
        create(root)
    error = caught.value
    assert (error.code, error.exit_code) == ("cannot-write", ExitCode.MACHINE)
    assert error.file is not None
    assert error.file.startswith(str(root))
    assert "--checkpoints" in error.mend


def test_a_full_disk_is_the_machines_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_module, "write_atomically", full)
    with pytest.raises(PipelineError) as caught:
        create(tmp_path)
    error = caught.value
    assert (error.code, error.exit_code) == ("cannot-write", ExitCode.MACHINE)
    assert error.message == "the run folder cannot be written: No space left on device"
    assert error.file == str(tmp_path / "triage" / "sft-001" / "experiment.yaml")


# The manifest


def test_an_update_is_on_the_disk_and_keeps_the_rest(tmp_path: Path) -> None:
    run = create(tmp_path, seed=3)
    run.update(metrics={"loss": 0.5}, seed=4)
    again = read_run(run.path)
    assert again.manifest == run.manifest
    assert (again.manifest["metrics"], again.manifest["seed"], again.status) == ({"loss": 0.5}, 4, "running")


def test_an_update_that_cannot_be_written_is_not_remembered(tmp_path: Path) -> None:
    """Else the run could not be closed either: its manifest would hold the NaN still."""
    run = create(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        run.update(metrics={"loss": float("nan")})
    run.end("failed", error={"code": "not-finite"})
    assert read_run(run.path).status == "failed"
    assert "metrics" not in run.manifest


def test_the_end_has_a_status_and_a_time(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.end("interrupted", adapter=None)
    again = read_run(run.path)
    assert (again.status, again.manifest["adapter"]) == ("interrupted", None)
    assert again.manifest["end"] >= again.manifest["start"]


def test_now_is_utc_to_the_second() -> None:
    moment = datetime.fromisoformat(now())
    assert moment.utcoffset() == timedelta(0)
    assert moment.microsecond == 0
    assert abs(moment - datetime.now(UTC)) < timedelta(seconds=5)


def test_a_folder_without_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        read_run(tmp_path)
    assert caught.value.code == "no-such-run"
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"stage": "sft"', "[]", '"sft"', "null", '{"stage": "sft"}', '{"status": "finished"}', "\udcff"],
)
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PipelineError) as caught:
        read_run(tmp_path)
    assert (caught.value.code, caught.value.file) == ("damaged-run", str(tmp_path / "run.json"))


# Listing


def manifest(start: str, status: str = "finished", stage: str = "sft") -> dict[str, Any]:
    return {"stage": stage, "status": status, "start": f"2026-01-01T00:00:{start}+00:00"}


def test_runs_are_listed_by_experiment_then_by_their_start(tmp_path: Path) -> None:
    """Two that began in the same second stand by name; one without a start stands first."""
    write_manifest(tmp_path, "zoo/sft-001", manifest("00"))
    write_manifest(tmp_path, "triage/sft-001", manifest("30"))
    write_manifest(tmp_path, "triage/dpo-001", manifest("20", stage="dpo"))
    write_manifest(tmp_path, "triage/sft-003", manifest("10"))
    write_manifest(tmp_path, "triage/sft-002", manifest("10"))
    write_manifest(tmp_path, "triage/sft-004", {"stage": "sft", "status": "finished"})
    names = [run.name for run in list_runs(tmp_path)]
    expected = [f"triage/{name}" for name in ("sft-004", "sft-002", "sft-003", "dpo-001", "sft-001")]
    assert names == [*expected, "zoo/sft-001"]
    assert [run.name for run in list_runs(tmp_path, "zoo")] == ["zoo/sft-001"]


def test_what_is_no_run_is_passed_over(tmp_path: Path) -> None:
    write_manifest(tmp_path, "triage/sft-001", manifest("00"))
    write_manifest(tmp_path, "triage/sft-002", "{")
    write_manifest(tmp_path, "triage/backup", manifest("01"))
    (tmp_path / "triage" / "sft-003").mkdir()
    (tmp_path / "README.md").write_text("about")
    assert [run.name for run in list_runs(tmp_path)] == ["triage/sft-001"]


def test_a_root_that_does_not_exist_holds_no_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []


def test_the_newest_finished_run_is_the_last_started_of_those_that_finished(tmp_path: Path) -> None:
    write_manifest(tmp_path, "triage/sft-001", manifest("10"))
    write_manifest(tmp_path, "triage/sft-002", manifest("20"))
    write_manifest(tmp_path, "triage/sft-003", manifest("30", "failed"))
    write_manifest(tmp_path, "triage/sft-004", manifest("40", "running"))
    write_manifest(tmp_path, "triage/dpo-001", manifest("50", stage="dpo"))
    write_manifest(tmp_path, "other/sft-001", manifest("55"))
    write_manifest(tmp_path, "triage/sft-005", {"stage": "sft", "status": "finished"})
    assert newest_finished(tmp_path, "triage", "sft").name == "triage/sft-002"


@pytest.mark.parametrize(
    ("there", "seen"),
    [
        ([], "(none was started)"),
        (["failed", "interrupted"], "(sft-001 is failed, sft-002 is interrupted)"),
    ],
)
def test_without_a_finished_run_the_error_says_which_there_are(tmp_path: Path, there: list[str], seen: str) -> None:
    write_manifest(tmp_path, "triage/dpo-001", manifest("00", stage="dpo"))
    for number, status in enumerate(there, 1):
        write_manifest(tmp_path, f"triage/sft-{number:03d}", manifest(f"{number:02d}", status))
    with pytest.raises(PipelineError) as caught:
        newest_finished(tmp_path, "triage", "sft")
    error = caught.value
    assert (error.code, error.file) == ("no-finished-run", str(tmp_path / "triage"))
    assert error.message == f"experiment `triage` has no finished SFT run under {tmp_path} {seen}"
    assert "pipeline sft" in error.mend


# Finding what a user names


def test_a_run_is_found_by_its_name_under_the_root(tmp_path: Path) -> None:
    run = create(tmp_path)
    found = find_run(tmp_path, "triage/sft-001")
    assert isinstance(found, Run)
    assert (found.path, found.manifest) == (run.path, run.manifest)


def test_a_run_is_found_by_its_folder_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path / "elsewhere")
    found = find_run(tmp_path / "checkpoints", str(run.path))
    assert isinstance(found, Run)
    assert found.path == run.path
    monkeypatch.chdir(run.path.parent)
    relative = find_run(tmp_path / "checkpoints", "sft-001")
    assert isinstance(relative, Run)
    assert relative.manifest == run.manifest


def test_an_adapter_folder_is_found_as_a_path(tmp_path: Path) -> None:
    """That of a run as well: named itself, it is taken as it is."""
    foreign = write_foreign_adapter(tmp_path / "foreign")
    assert find_run(tmp_path, str(foreign)) == foreign
    assert find_run(tmp_path, "foreign") == foreign
    run = create(tmp_path)
    write_foreign_adapter(run.adapter)
    assert find_run(tmp_path, "triage/sft-001/adapter") == run.adapter


def test_a_run_that_is_damaged_is_said_so(tmp_path: Path) -> None:
    write_manifest(tmp_path, "triage/sft-001", "{")
    with pytest.raises(PipelineError, match="damaged-run"):
        find_run(tmp_path, "triage/sft-001")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", None])
def test_what_is_neither_is_an_error(tmp_path: Path, missing: str | None) -> None:
    if missing is not None:
        folder = write_foreign_adapter(tmp_path / "foreign")
        (folder / missing).unlink()
    with pytest.raises(PipelineError) as caught:
        find_run(tmp_path, "foreign")
    assert caught.value.code == "no-such-run"
    assert "`foreign` is neither a run nor a folder with a PEFT adapter" in caught.value.message


def test_a_run_is_required_where_an_adapter_alone_will_not_do(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert require_run(run) is run
    with pytest.raises(PipelineError) as caught:
        require_run(tmp_path / "foreign")
    assert (caught.value.code, caught.value.file) == ("no-such-run", str(tmp_path / "foreign"))
