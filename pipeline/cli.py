"""The `pipeline` command: arguments to experiment to stage. No logic lives here.

torch and the training libraries are imported by the commands that train or generate, so that `--help`, `validate`,
`init` and `runs` answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import ExitCode, PipelineError, PipelineErrors
from pipeline.machine import machine_failure

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.experiment import Experiment
    from pipeline.experiment_file import LoadedExperiment
    from pipeline.runs.resume import Resume

Answer = tuple[dict[str, Any], ExitCode]
"""What a command returns: its JSON, and its exit code."""
_PATIENCE = 10.0
"""Seconds in which the first of several processes says what is wrong: one that ends before has `torchrun` end all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (`ExitCode`)."""
    arguments = _parser().parse_args(argv)
    # Of several processes, which `torchrun` starts for one run, the first one speaks.
    first = os.environ.get("RANK", "0") == "0"
    as_json = arguments.format == "json" and first
    from rich.console import Console

    # With --format json, stdout is one JSON object's: people, and libraries that print, get stderr.
    console = Console(stderr=as_json, soft_wrap=True, quiet=not first)
    # bitsandbytes, where it is installed, tells everyone of a faster kernel that it did not find, when it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with ExitStack() as stack:
        stack.enter_context(_stoppable())
        if as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        try:
            _require_one_process(arguments)
            answer, code = arguments.command(arguments, console)
        except PipelineError as error:
            if arguments.debug:
                raise
            answer, code = _refused(error), error.exit_code
            if not first and code != ExitCode.MACHINE:
                _wait_for_the_first()
            elif not as_json:
                _print_error(error, arguments.format)
        except KeyboardInterrupt:
            if arguments.debug:
                raise
            answer, code = {"ok": False, "errors": []}, ExitCode.INTERRUPTED
            if first:
                sys.stderr.write("interrupted\n")
        except BrokenPipeError:
            # The reader of our output has gone (`| head`); there is nobody left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return int(ExitCode.DONE)
        except Exception as error:
            if arguments.debug:
                raise
            defect = machine_failure(error) or _defect(error)
            answer, code = _refused(defect), defect.exit_code
            if not first:
                _wait_for_the_first()
            elif not as_json:
                _print_error(defect)
    if as_json:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n")
    return int(code)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 (SLURM's warning) end a command as Ctrl-C does; the training loop has its own answer."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_the_first() -> None:
    """Another process than the first waits until that one has said what is wrong: ending ends all of them."""
    with suppress(KeyboardInterrupt):
        time.sleep(_PATIENCE)


def _require_one_process(arguments: argparse.Namespace) -> None:
    """Only a stage is trained by several processes.

    Raises:
        PipelineError: `torchrun` started several of another command.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and arguments.command not in (_sft, _dpo):
        raise PipelineError(
            "several processes train a stage; this command is for one",
            code="several-processes",
            mend="run `sft` and `dpo` with torchrun, and this command without it",
        )


def _defect(error: Exception) -> PipelineError:
    """A defect of ours: said as one, in one line, unless asked for more."""
    return PipelineError(
        f"{type(error).__name__}: {error}",
        code="internal",
        mend="this is a defect: run it again with --debug and report what it prints",
        exit_code=ExitCode.WRONG,
    )


def _refused(error: PipelineError) -> dict[str, Any]:
    errors = error.errors if isinstance(error, PipelineErrors) else [error]
    return {"ok": False, "errors": [one.as_dict() for one in errors]}


def _print_error(error: PipelineError, format: str = "text") -> None:
    errors = error.errors if isinstance(error, PipelineErrors) else [error]
    if format == "github":
        from pipeline.data.github import error_annotation

        sys.stdout.write("".join(f"{error_annotation(one)}\n" for one in errors))
        return
    sys.stderr.write("".join(f"error: {one}\n" for one in errors))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipeline",
        description="Preference alignment: supervised fine-tuning, then DPO on the same adapter.",
        epilog="Exit codes: 0 done, 1 the work found something wrong, 2 wrong usage or experiment, "
        "3 interrupted, 4 the machine failed.",
    )
    parser.add_argument("--version", action="version", version=f"pipeline {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="let errors through with their traceback")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR", help="where runs live")
    experiment = argparse.ArgumentParser(add_help=False, parents=[where])
    experiment.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="the experiment's YAML file")
    experiment.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value, e.g. dpo.beta=0.2"
    )
    dry = argparse.ArgumentParser(add_help=False)
    dry.add_argument("--dry-run", action="store_true", help="a few steps on the longest rows; nothing is kept")
    accept = argparse.ArgumentParser(add_help=False)
    accept.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although data, experiment, base or libraries have changed; the manifest says so",
    )
    resume = argparse.ArgumentParser(add_help=False)
    resume.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a stopped run from its newest whole checkpoint; without RUN, the newest unfinished one",
    )

    columns: dict[str, Any] = {
        "action": "append",
        "default": [],
        "metavar": "COLUMN=FIELD",
        "help": "a column of the file and the field that it stands for, e.g. question=prompt",
    }

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[..., Answer], text: str, *parents: argparse.ArgumentParser, github: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common, *parents])
        sub.set_defaults(command=command)
        formats = ("text", "json", *(["github"] if github else []))
        what = "json: one object on stdout" + ("; github: annotations" if github else "")
        sub.add_argument("--format", choices=formats, default="text", help=what)
        return sub

    init = add("init", _init, "write starter experiments and sample data")
    init.add_argument("directory", type=Path, metavar="DIR")
    validate = add("validate", _validate, "check data files, or an experiment file and all that it names", github=True)
    validate.add_argument("files", type=Path, nargs="+", metavar="FILE")
    validate.add_argument("--kind", choices=("demonstration", "preference"), help="what the data is for")
    validate.add_argument("--map", **columns)
    validate.add_argument("--max-errors", type=int, default=100, metavar="N", help="errors to show; all are counted")
    validate.add_argument(
        "--near-duplicates",
        action=argparse.BooleanOptionalAction,
        help="look for rows that are nearly the same; without it, in files of up to 4 MiB",
    )
    validate.add_argument(
        "--tokens",
        action=argparse.BooleanOptionalAction,
        help="tokenise an experiment's rows as its stages will; without it, up to 64 MiB of them",
    )
    convert = add("convert", _convert, "write data of any known format as canonical JSONL")
    convert.add_argument("source", type=Path, metavar="IN")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--to", choices=("demonstration", "preference"), required=True, help="what the data is for")
    convert.add_argument("--map", **columns)
    convert.add_argument("--force", action="store_true", help="overwrite OUT")
    convert.add_argument("--skip-invalid", action="store_true", help="leave out rows that are wrong, and count them")
    inspect = add("inspect", _inspect, "a row as tokens: what is in the loss, where it is cut", experiment)
    inspect.add_argument("--stage", choices=("sft", "dpo"), help="else each that has data")
    which = "the line of the row in JSONL and CSV, in other files which row it is, from 1; else the first that is right"
    inspect.add_argument("--row", type=int, metavar="N", help=which)
    inspect.add_argument("--ids", action="store_true", help="a line for each token, with its id")
    plan = add("plan", _plan, "what would be trained, in how many steps and how much memory", experiment)
    plan.add_argument("--stage", choices=("sft", "dpo"), help="whose figures come first; else the first that has data")
    add("sft", _sft, "phase one: supervised fine-tuning of a LoRA adapter", experiment, dry, resume, accept)
    text = "phase two: DPO on the SFT adapter, which is also the reference"
    dpo = add("dpo", _dpo, text, experiment, dry, resume, accept)
    dpo.add_argument(
        "--from",
        dest="start",
        metavar="RUN",
        help="a run, an adapter folder or an adapter's hub id; else the newest finished SFT run",
    )
    align = add("align", _align, "sft, dpo and compare in one go", experiment, accept)
    align.add_argument("--resume", action="store_true", help="go on where it stopped: a finished phase is kept")
    compare = add("compare", _compare, "the base and runs on the same held-out prompts", where)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a folder with a PEFT adapter")
    compare.add_argument("--experiment", type=Path, metavar="FILE", help="whose prompts; else the last run's")
    compare.add_argument(
        "--base", action=argparse.BooleanOptionalAction, default=True, help="ask the base as well (default)"
    )
    compare.add_argument(
        "--judge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the experiment's judge compare the answers, where it names one (default)",
    )
    compare.add_argument(
        "--lm-eval",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the experiment's tasks of lm-eval to every version, where it names any (default)",
    )
    compare.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. evaluation.temperature=0.7"
    )
    report = add("report", _report, "one HTML page about runs, that asks nothing of the network", where)
    report.add_argument("runs", nargs="+", metavar="RUN", help="the page goes into the last one's folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="another place for the page")
    verify = add("verify", _verify, "repeat a run's proof from its folders, and say what has changed since", where)
    verify.add_argument("run", metavar="RUN")
    merge = add("merge", _merge, "an adapter folded into its base, as a plain Transformers model", where)
    merge.add_argument("run", metavar="RUN", help="a run, an adapter folder or an adapter's hub id")
    merge.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model; else the run's")
    send = add("wandb-sync", _wandb_sync, "send a run's record to W&B that could not be sent while it trained", where)
    send.add_argument("run", metavar="RUN")
    runs = add("runs", _runs, "list the runs, or what differs between some of them", where)
    runs.add_argument("--experiment", metavar="NAME", help="only its runs")
    runs.add_argument("--stage", choices=("sft", "dpo"))
    runs.add_argument("--status", choices=("running", "finished", "failed", "interrupted", "dead"))
    sorts = ("name", "start", "loss", "accuracy", "margin", "checks")
    runs.add_argument("--sort", choices=sorts, default="name", help="best first; default: name")
    runs.add_argument("--reverse", action="store_true")
    diff = runs.add_subparsers(title="instead", metavar="diff").add_parser(
        "diff", help="what differs in experiment, data, versions and results"
    )
    diff.set_defaults(command=_runs_diff)
    diff.add_argument("runs", nargs="+", metavar="RUN")
    diff.add_argument("--format", choices=("text", "json"), default=argparse.SUPPRESS)
    diff.add_argument("--checkpoints", type=Path, default=argparse.SUPPRESS, metavar="DIR")
    diff.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    chat = add("chat", _chat, "talk to the base and a run side by side; a line of input is a turn", where)
    chat.add_argument("run", metavar="RUN")
    chat.add_argument("--system", metavar="TEXT", help="a system turn to begin with")
    cache = add("cache", _cache, "what is kept to save time: converted models, log-probabilities of references")
    cache.add_argument("--clear", choices=("models", "references", "all"), help="remove it")
    return parser


@contextmanager
def _experiment(arguments: argparse.Namespace) -> Iterator[Experiment]:
    """The experiment that is asked for; what is found wrong with it later gets its file and line as well."""
    from pipeline.experiment_file import load_experiment

    loaded = load_experiment(arguments.experiment, arguments.set)
    try:
        yield loaded.experiment
    except PipelineErrors as several:
        raise PipelineErrors([_placed(error, loaded) for error in several.errors]) from several
    except PipelineError as error:
        raise _placed(error, loaded) from error


def _placed(error: PipelineError, loaded: LoadedExperiment) -> PipelineError:
    return loaded.placed(error) if error.pointer is not None and error.file is None else error


def _init(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.starter import write_starter

    files = write_starter(arguments.directory)
    for file in files:
        console.print(str(file), highlight=False)
    recipe = arguments.directory / "recipes" / "triage.yaml"
    console.print(f"next: pipeline align {recipe}", highlight=False)
    return {"ok": True, "files": [str(file) for file in files]}, ExitCode.DONE


def _validate(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.data.columns import read_map
    from pipeline.data.report import as_json, print_reports
    from pipeline.validation import validate

    near, columns = arguments.near_duplicates, read_map(arguments.map)
    reports = validate(
        arguments.files,
        arguments.kind,
        max_errors=arguments.max_errors,
        near=near,
        columns=columns,
        tokens=arguments.tokens,
    )
    if arguments.format == "github":
        from pipeline.data.github import annotation_lines

        sys.stdout.write("".join(f"{line}\n" for line in annotation_lines(reports)))
    else:
        print_reports(reports, console)
    answer = as_json(reports)
    return answer, ExitCode.DONE if answer["ok"] else ExitCode.WRONG


def _convert(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.data.columns import read_map
    from pipeline.data.export import export

    written = export(
        arguments.source,
        arguments.to,
        arguments.out,
        force=arguments.force,
        skip_invalid=arguments.skip_invalid,
        columns=read_map(arguments.map),
    )
    skipped = f", {written.skipped:,} wrong ones left out" if written.skipped else ""
    console.print(f"{written.path}: {written.rows:,} rows{skipped}", highlight=False)
    formats = {"format": written.report.format, "kind": arguments.to}
    answer = {"ok": True, "path": str(written.path), "rows": written.rows, "skipped": written.skipped, **formats}
    return answer, ExitCode.DONE


def _inspect(arguments: argparse.Namespace, console: Console) -> Answer:
    with _experiment(arguments) as experiment:
        from pipeline.inspection import inspect, print_examples
        from pipeline.model.base import find_base, load_tokenizer

        files = find_base(experiment.model, console.print)
        tokenizer = load_tokenizer(files, experiment.model, experiment.tokenizer.chat_template)
        examples = inspect(experiment, tokenizer, arguments.stage, arguments.row)
    print_examples(examples, console, tokenizer, with_ids=arguments.ids)
    return {"ok": True, "examples": [example.as_dict() for example in examples]}, ExitCode.DONE


def _plan(arguments: argparse.Namespace, console: Console) -> Answer:
    with _experiment(arguments) as experiment:
        from pipeline.plan.plan import plan
        from pipeline.plan.table import print_plan

        planned = plan(experiment, arguments.checkpoints, console, stage=arguments.stage)
    print_plan(planned, console)
    return {"ok": True, **planned.as_dict()}, ExitCode.DONE


def _sft(arguments: argparse.Namespace, console: Console) -> Answer:
    with _experiment(arguments) as experiment:
        from pipeline.training.sft import run_sft

        resume = _resume(arguments, dry_run=arguments.dry_run)
        outcome = run_sft(experiment, arguments.checkpoints, console, dry_run=arguments.dry_run, resume=resume)
    return {"ok": True, **outcome.as_dict()}, ExitCode.DONE


def _dpo(arguments: argparse.Namespace, console: Console) -> Answer:
    with _experiment(arguments) as experiment:
        from pipeline.training.dpo import run_dpo

        resume = _resume(arguments, dry_run=arguments.dry_run, start=arguments.start)
        outcome = run_dpo(
            experiment,
            arguments.checkpoints,
            console,
            start=arguments.start,
            dry_run=arguments.dry_run,
            resume=resume,
        )
    return {"ok": True, **outcome.as_dict()}, ExitCode.DONE


def _wandb_sync(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.experiment_file import load_experiment
    from pipeline.runs.run import find_run, require_run
    from pipeline.wandb_sync import sync

    run = require_run(find_run(arguments.checkpoints, arguments.run))
    experiment = load_experiment(run.path / "experiment.yaml").experiment
    sent = sync(run, experiment, lambda line: console.print(line, highlight=False))
    return {"ok": True, "run": str(run.path), "wandb": sent}, ExitCode.DONE


def _resume(arguments: argparse.Namespace, *, dry_run: bool = False, start: str | None = None) -> Resume | None:
    """What `--resume` and `--accept-changes` ask for.

    Raises:
        PipelineError: they are given with something that they exclude.
    """
    from pipeline.runs.resume import Resume

    if arguments.resume is None or arguments.resume is False:
        if arguments.accept_changes:
            raise _conflict("--accept-changes", "only with --resume")
        return None
    if dry_run:
        raise _conflict("--resume", "not with --dry-run, which leaves no run")
    if start is not None:
        raise _conflict("--from", "not with --resume: a resumed run keeps the adapter that it was started with")
    name = arguments.resume if isinstance(arguments.resume, str) else ""
    return Resume(name or None, arguments.accept_changes)


def _conflict(option: str, when: str) -> PipelineError:
    return PipelineError(f"`{option}` goes {when}", code="conflict", mend=f"leave {option} out")


def _align(arguments: argparse.Namespace, console: Console) -> Answer:
    with _experiment(arguments) as experiment:
        from pipeline.align import align
        from pipeline.evaluation.table import print_comparison

        resume = _resume(arguments) if arguments.resume else None
        outcomes, comparison, report = align(experiment, arguments.checkpoints, console, resume=resume)
    print_comparison(comparison, console)
    console.print(f"written: {outcomes[-1].run}/compare.json", highlight=False)
    console.print(f"report: {report}", highlight=False)
    runs = [str(outcome.run) for outcome in outcomes]
    stages = {"sft": outcomes[0].as_dict(), "dpo": outcomes[1].as_dict()}
    answer = {"ok": True, "runs": runs, "stages": stages, "compare": comparison.as_dict(), "report": str(report)}
    return answer, ExitCode.DONE


def _compare(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.runs.run import find_run

    runs = [find_run(arguments.checkpoints, name) for name in arguments.runs]
    from pipeline.evaluation.runs import compare_runs, experiment_of
    from pipeline.evaluation.table import print_comparison
    from pipeline.experiment_file import load_experiment

    if arguments.experiment is None:
        experiment = experiment_of(runs[-1], arguments.set)
    else:
        experiment = load_experiment(arguments.experiment, arguments.set).experiment
    comparison = compare_runs(
        runs,
        experiment,
        arguments.checkpoints,
        console,
        with_base=arguments.base,
        with_judge=arguments.judge,
        with_lm_eval=arguments.lm_eval,
    )
    print_comparison(comparison, console)
    return {"ok": True, **comparison.as_dict()}, ExitCode.DONE


def _report(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.report.page import write_report
    from pipeline.runs.run import find_run, require_run

    runs = [require_run(find_run(arguments.checkpoints, name)) for name in arguments.runs]
    path = write_report(runs, arguments.checkpoints, arguments.out)
    console.print(f"written: {path}", highlight=False)
    return {"ok": True, "path": str(path)}, ExitCode.DONE


def _verify(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.runs.run import find_run, require_run

    run = require_run(find_run(arguments.checkpoints, arguments.run))
    from pipeline.experiment_file import load_experiment
    from pipeline.training.verify import as_dict, verify_run

    experiment = load_experiment(run.path / "experiment.yaml").experiment
    findings = verify_run(run, experiment, arguments.checkpoints, console)
    for finding in findings:
        console.print(f"{'ok   ' if finding.ok else 'WRONG'} {finding.name}: {finding.message}", highlight=False)
    answer = as_dict(run, findings)
    return answer, ExitCode.DONE if answer["ok"] else ExitCode.WRONG


def _merge(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.model.merge import merge_named

    merged = merge_named(arguments.checkpoints, arguments.run, arguments.out, arguments.dtype, console.print)
    console.print(
        f"written: {merged.path} ({merged.parameters:,} parameters in {merged.dtype}, {merged.apart:.1e} nats from "
        f"the adapter on its base; allowed {merged.allowed:g})",
        highlight=False,
    )
    return {"ok": True, **merged.as_dict()}, ExitCode.DONE


def _runs(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.runs.listing import listed, print_runs

    rows = listed(
        arguments.checkpoints,
        experiment=arguments.experiment,
        stage=arguments.stage,
        status=arguments.status,
        sort=arguments.sort,
        reverse=arguments.reverse,
    )
    if rows:
        print_runs(rows, console)
    else:
        console.print(f"no such runs under {arguments.checkpoints}")
    return {"ok": True, "runs": rows}, ExitCode.DONE


def _runs_diff(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.runs.differences import run_differences
    from pipeline.runs.listing import print_differences
    from pipeline.runs.run import find_run, require_run

    runs = [require_run(find_run(arguments.checkpoints, name)) for name in arguments.runs]
    names = [run.name for run in runs]
    parts = run_differences(runs)
    print_differences(names, parts, console)
    return {"ok": True, "runs": names, "differences": parts}, ExitCode.DONE


def _chat(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.runs.run import find_run

    run = find_run(arguments.checkpoints, arguments.run)
    from pipeline.chat import chat

    return {"ok": True, "turns": chat(run, console, system=arguments.system)}, ExitCode.DONE


def _cache(arguments: argparse.Namespace, console: Console) -> Answer:
    from pipeline.cache import KINDS, clear_cache, list_cache, print_cache

    before = list_cache()
    if arguments.clear:
        clear_cache([kind for kind in KINDS if arguments.clear in (kind, "all")])
    entries = list_cache()
    cleared = sum(entry["bytes"] for entry in before) - sum(entry["bytes"] for entry in entries)
    if arguments.clear:
        console.print(f"cleared: {cleared / 2**20:,.1f} MiB", highlight=False)
    print_cache(entries, console)
    return {"ok": True, "entries": entries, "cleared_bytes": cleared}, ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
