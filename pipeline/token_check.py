"""What the tokenizer does to an experiment's rows, found out in a process of its own, for `pipeline validate`.

Transformers imports torch wherever it is installed, which takes seconds and which `pipeline validate` does not do. The
process that is started here hides torch from it: tokenizers need none of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.result import Report, Violation
from pipeline.data.shards import expand
from pipeline.errors import PipelineError
from pipeline.experiment import Experiment, Split

_WRONG = ("no-chat-template", "no-eos-token", "no-such-file")
"""With these no stage would begin."""
MAX_BYTES = 64 * 2**20
"""Larger data is tokenised only where that is asked for: it takes about a second a megabyte."""


@dataclass(frozen=True)
class TokenReport:
    """What the tokenizer does to the rows of one file."""

    file: str
    kind: str
    dropped: int
    """Rows that cannot be trained on."""
    error_counts: dict[str, int]
    warning_counts: dict[str, int]
    errors: list[Violation]
    warnings: list[Violation]
    tokens: dict[str, Any]
    """`tokenised.Counted.as_dict` and, under `stage`, for which stage."""
    lines: list[str] = field(default_factory=list)
    """The same for a person."""


def add_tokens(reports: Sequence[Report], experiment: Experiment, max_errors: int, asked: bool | None) -> None:
    """Adds to the reports of an experiment's files what its tokenizer does to their rows.

    Where the tokenizer is not at hand, the first report gets a warning that says so.

    Args:
        reports: of the files that the experiment names.
        experiment: with absolute paths.
        max_errors: how many errors, and how many warnings, a report keeps.
        asked: whether to do it; None: where the data has up to `MAX_BYTES`.
    """
    if asked is False or not reports:
        return
    size = sum(path.stat().st_size for path in {Path(report.file) for report in reports} if path.is_file())
    if asked is None and size > MAX_BYTES:
        message = f"the data has {size / 2**20:,.0f} MiB, so its rows were not tokenised"
        _warn(reports[0], message, "ask for it with --tokens (about a second a megabyte)", max_errors)
        return
    answer = _ask(experiment)
    if isinstance(answer, PipelineError):
        reports[0].add_file_error(answer, max_errors)
        return
    if isinstance(answer, str):
        mend = "the stages check the same before a model is loaded; download the model to have it checked here"
        _warn(reports[0], f"the rows were not tokenised: {answer}", mend, max_errors)
        return
    by_file = {(report.file, report.kind): report for report in reports}
    for found in answer:
        if (report := by_file.get((found.file, found.kind))) is not None:  # type: ignore[arg-type]
            _add(report, found, max_errors)


def _add(report: Report, found: TokenReport, max_errors: int) -> None:
    report.tokens = {**found.tokens, "described": found.lines}
    report.valid -= found.dropped
    report.error_count += sum(found.error_counts.values())
    report.error_counts.update(found.error_counts)
    report.warning_counts.update(found.warning_counts)
    report.errors += found.errors[: max(max_errors - len(report.errors), 0)]
    report.warnings += found.warnings[: max(max_errors - len(report.warnings), 0)]


def _warn(report: Report, message: str, mend: str, max_errors: int) -> None:
    report.warning_counts["not-tokenised"] += 1
    if len(report.warnings) < max_errors:
        report.warnings.append(Violation(report.file, None, None, "not-tokenised", message, mend, "warning"))


def _ask(experiment: Experiment) -> list[TokenReport] | PipelineError | str:
    """The other process's reports; what is wrong with the tokenizer; or why it is not at hand."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.token_check"],
        input=experiment.model_dump_json(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"the process that tokenises ended with {done.returncode}: {last[:200]}"
    if "refused" in answer:
        refused = answer["refused"]
        if refused["code"] in _WRONG:
            return PipelineError(refused["message"], code=refused["code"], mend=refused["mend"])
        return str(refused["message"])
    return [
        TokenReport(
            **{
                **one,
                "errors": [Violation(**violation) for violation in one["errors"]],
                "warnings": [Violation(**violation) for violation in one["warnings"]],
            }
        )
        for one in answer["reports"]
    ]


def token_reports(experiment: Experiment) -> list[TokenReport]:
    """What the tokenizer does to the rows of each of the experiment's stages; rows that are wrong before are left out.

    Raises:
        PipelineError: the tokenizer is not to be had.
    """
    from pipeline.data.check import load_rows
    from pipeline.data.tokenised import WARNINGS, label_demonstrations, tokenize_preferences
    from pipeline.errors import PipelineErrors
    from pipeline.model.base import find_base, load_tokenizer

    tokenizer = load_tokenizer(find_base(experiment.model), experiment.model, experiment.tokenizer.chat_template)
    splits = {"demonstration": experiment.data.demonstrations, "preference": experiment.data.preferences}
    columns = {kind: split.map for kind, split in splits.items() if split is not None}
    reports = []
    for stage, kind, path in _files(experiment):
        try:
            rows = load_rows(path, kind, set_aside=True, columns=columns[kind])
        except PipelineErrors:
            continue  # the file's own report says it
        if stage == "sft":
            counted = label_demonstrations(tokenizer, rows, experiment.sft.max_length)[1]
        else:
            counted = tokenize_preferences(tokenizer, rows, experiment.dpo.max_length)[1]
        reports.append(
            TokenReport(
                file=counted.file,
                kind=kind,
                dropped=counted.dropped,
                error_counts={code: count for code, count in counted.codes.items() if code not in WARNINGS},
                warning_counts={code: count for code, count in counted.codes.items() if code in WARNINGS},
                errors=counted.errors,
                warnings=counted.warnings,
                tokens={"stage": stage, **counted.as_dict()},
                lines=list(counted.describe()),
            )
        )
    return reports


def _files(experiment: Experiment) -> list[tuple[str, str, Path]]:
    """Stage, kind and path of each file that is trained or evaluated on during training, each shard once."""
    splits: list[tuple[str, str, Split | None]] = [
        ("sft", "demonstration", experiment.data.demonstrations),
        ("dpo", "preference", experiment.data.preferences),
    ]
    named = [
        (stage, kind, shard)
        for stage, kind, split in splits
        if split
        for path in (split.train, split.eval)
        if path
        for shard in expand(Path(path))
    ]
    return list(dict.fromkeys(named))


def main() -> None:
    """Reads an experiment as JSON from stdin, and writes the reports, or why there are none, as a line of JSON."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from dataclasses import asdict

    experiment = Experiment.model_validate(json.loads(sys.stdin.read()))
    try:
        answer: dict[str, Any] = {"reports": [_plain(asdict(report)) for report in token_reports(experiment)]}
    except PipelineError as error:
        answer = {"refused": error.as_dict()}
    except ImportError as error:
        message = f"{experiment.model.id} is not ready to be read on this machine ({error})"
        answer = {"refused": {"code": "not-ready", "message": message}}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    for violation in report["errors"] + report["warnings"]:
        del violation["excerpt"]
    return report


if __name__ == "__main__":
    main()
