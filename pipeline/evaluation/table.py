"""A comparison as a person reads it: a column a model, a row a metric, and a few answers side by side."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.data.place import printable
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.results import Comparison, Sample, samples_worth_showing

_WORDS = {
    "json_conformance": "conforms to the schema",
    "ends_by_itself": "ends by itself",
    "preference_accuracy": "prefers chosen answers",
    "preference_margin": "reward margin",
    "perplexity": "perplexity",
    "length_mean": "answer length, tokens",
}
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
    for model, reasons in comparison.absent.items():
        for name, reason in reasons.items():
            console.print(Text(f"{model}: no {_words(name)}: {reason}", style="yellow"))
    for sample in samples_worth_showing(comparison.samples, samples):
        console.print()
        console.print(Text("prompt: ", style="bold").append(_shown(_asked(sample)), style="not bold"))
        console.print(_sample(sample, comparison.models))


def _figures(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for model in comparison.models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for name in _names(comparison):
        estimates = [comparison.metrics[model].get(name) for model in comparison.models]
        rows = sorted({estimate.n for estimate in estimates if estimate is not None})
        cells = [_cell(comparison, model, name) for model in comparison.models]
        table.add_row(Text(_words(name)), "/".join(map(str, rows)), *cells)
    return table


def _names(comparison: Comparison) -> list[str]:
    """The metrics that any model has: what the user asked for first, then the rest as `_WORDS` has them."""
    names = list(dict.fromkeys(name for metrics in comparison.metrics.values() for name in metrics))
    order = ["json_conformance", *(name for name in names if "/" in name), *_WORDS]
    return sorted(names, key=order.index)


def _words(name: str) -> str:
    kind, _, rest = name.partition("/")
    if kind == "match":
        return f"{rest} correct"
    if kind == "check":
        return f"check {rest}"
    return _WORDS[name]


def _is_share(name: str) -> bool:
    return name not in ("preference_margin", "perplexity", "length_mean")


def _cell(comparison: Comparison, model: str, name: str) -> Text:
    estimate = comparison.metrics[model].get(name)
    if estimate is None:
        return Text("-", style="dim")
    cell = Text(_number(estimate.value, name) + (" %" if _is_share(name) else ""), style="bold")
    cell.append(f" {_interval(estimate, name)}", style="not bold")
    delta = comparison.deltas.get(model, {}).get(name)
    if delta is not None:
        # Only where the whole interval is on one side of zero is a direction more than chance.
        style = "not bold" if delta.low > 0 or delta.high < 0 else "not bold dim"
        unit = " pt" if _is_share(name) else ""
        cell.append(f"\n{_number(delta.value, name, '+')}{unit} {_interval(delta, name, '+')}", style=style)
    return cell


def _interval(estimate: Estimate, name: str, sign: str = "") -> str:
    return f"[{_number(estimate.low, name, sign)}, {_number(estimate.high, name, sign)}]"


def _number(value: float, name: str, sign: str = "") -> str:
    if _is_share(name):
        # The interval of fifty prompts spans tens of points: decimals would be noise.
        return f"{100 * value:{sign}.0f}"
    return f"{value:{sign}.1f}" if abs(value) >= 100 else f"{value:{sign}#.3g}"


def _sample(sample: Sample, models: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for model in models:
        table.add_column(Text(model), overflow="fold")
    table.add_row(*(Text(_shown(sample.outputs[model])) for model in models))
    failed = [[name for name, holds in sample.checks[model].items() if not holds] for model in models]
    if any(sample.checks.values()):
        table.add_row(*(_verdict(names) for names in failed))
    return table


def _asked(sample: Sample) -> str:
    """The last thing the user said."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    said = [turn.get("content") for turn in sample.prompt if turn.get("role") == "user"]
    return said[-1] if said and isinstance(said[-1], str) else ""


def _verdict(failed: list[str]) -> Text:
    if failed:
        return Text("fails: " + ", ".join(failed), style="red")
    return Text("passes all checks", style="green")


def _shown(text: str) -> str:
    """Cut to what fits beside others, with nothing in it that a terminal would act on."""
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " [...]"
    return "\n".join(map(printable, cut.split("\n")))
