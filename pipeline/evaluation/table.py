"""A comparison as a person reads it: a column a model, a row a metric, and a few answers side by side."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.data.place import printable
from pipeline.evaluation.harness import task_rows
from pipeline.evaluation.results import Comparison, Sample, samples_worth_showing
from pipeline.evaluation.wording import in_order, interval_text, is_share, last_said, metric_words, number_text

_SHOWN_CHARACTERS = 300


def print_comparison(comparison: Comparison, console: Console, *, samples: int = 3) -> None:
    """Prints the figures with their 95 % intervals and differences to the base, then `samples` prompts'
    answers.

    Model output is printed as it is: nothing in it is read as markup or as a terminal's control sequence.
    """
    console.print(_figures(comparison))
    note = "In brackets: 95 % intervals."
    if comparison.deltas:
        note += f" Below: the difference to {comparison.base}, row by row (pt: points of percent)."
    console.print(Text(note, style="dim"))
    took = ", ".join(f"{model} {seconds:.0f} s" for model, seconds in comparison.seconds.items())
    console.print(Text(f"Measured in: {took}.", style="dim"))
    for model, reasons in comparison.absent.items():
        for name, reason in reasons.items():
            console.print(Text(f"{model}: no {metric_words(name)}: {reason}", style="yellow"))
    for sample in samples_worth_showing(comparison.samples, samples):
        console.print()
        console.print(Text("prompt: ", style="bold").append(_shown(last_said(sample.prompt, "user")), style="not bold"))
        console.print(_sample(sample, comparison.models))
    _print_judge(comparison, console)
    if any(comparison.lm_eval.values()):
        console.print()
        console.print(_tasks(comparison))
        console.print(Text("lm-eval's figures, with its standard errors.", style="dim"))
    print_verdict(comparison, console)


def _print_judge(comparison: Comparison, console: Console) -> None:
    for model, others in comparison.judge.items():
        for other, judged in others.items():
            rate = judged.win_rate
            share = "" if rate is None else f", {number_text(rate.value, 'judge')} % {interval_text(rate, 'judge')}"
            failed = f", {judged.failed} not judged" if judged.failed else ""
            console.print(
                Text(f"judge: {model} against {other}: {judged.wins} won, {judged.ties} even, {judged.losses} lost")
                .append(share)
                .append(failed)
            )


def _tasks(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("lm-eval", overflow="fold")
    table.add_column("n", justify="right")
    for model in comparison.models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for name, counts, figures in task_rows(comparison.as_dict()):
        table.add_row(Text(name), counts, *(Text(figure or "-") for figure in figures))
    return table


def print_verdict(comparison: Comparison, console: Console) -> None:
    """Prints which version should survive, and what is better and worse about it beyond chance."""
    verdict = comparison.verdict
    if verdict is None:
        return
    console.print()
    console.print(Text("verdict: ", style="bold").append(verdict.sentence, style="not bold"))
    for word, found, style in (("better", verdict.gains, "green"), ("worse", verdict.losses, "yellow")):
        for other, metrics in found.items():
            if metrics:
                console.print(Text(f"  {word} than {other}: {', '.join(map(metric_words, metrics))}", style=style))


def _figures(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for model in comparison.models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for name in in_order(name for metrics in comparison.metrics.values() for name in metrics):
        estimates = [comparison.metrics[model].get(name) for model in comparison.models]
        rows = sorted({estimate.n for estimate in estimates if estimate is not None})
        cells = [_cell(comparison, model, name) for model in comparison.models]
        table.add_row(Text(metric_words(name)), "/".join(map(str, rows)), *cells)
    return table


def _cell(comparison: Comparison, model: str, name: str) -> Text:
    estimate = comparison.metrics[model].get(name)
    if estimate is None:
        return Text("-", style="dim")
    cell = Text(number_text(estimate.value, name) + (" %" if is_share(name) else ""), style="bold")
    cell.append(f" {interval_text(estimate, name)}", style="not bold")
    delta = comparison.deltas.get(model, {}).get(name)
    if delta is not None:
        # Only where the whole interval is on one side of zero is a direction more than chance.
        style = "not bold" if delta.low > 0 or delta.high < 0 else "not bold dim"
        unit = " pt" if is_share(name) else ""
        cell.append(f"\n{number_text(delta.value, name, '+')}{unit} {interval_text(delta, name, '+')}", style=style)
    return cell


def _sample(sample: Sample, models: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for model in models:
        table.add_column(Text(model), overflow="fold")
    table.add_row(*(Text(_shown(sample.outputs[model])) for model in models))
    failed = [[name for name, holds in sample.checks[model].items() if not holds] for model in models]
    if any(sample.checks.values()):
        table.add_row(*(_verdict(names) for names in failed))
    return table


def _verdict(failed: list[str]) -> Text:
    if failed:
        return Text("fails: " + ", ".join(failed), style="red")
    return Text("passes all checks", style="green")


def _shown(text: str) -> str:
    """Cut to what fits beside others, with nothing in it that a terminal would act on."""
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " [...]"
    return "\n".join(map(printable, cut.split("\n")))
