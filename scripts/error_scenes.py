"""What can be wrong with data and rows of text alone do not show: for each code, a scene that is played to give it.

A scene is told in a sentence, and played in an empty folder; what it gives is what the code of the package says.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from error_examples import ANSWER, GOOD, LONG, PAIR, TEXT, USER, talk

from pipeline.data.archives import FREE_BYTES
from pipeline.data.check import check_file, load_rows
from pipeline.data.columns import read_map
from pipeline.data.export import export
from pipeline.data.read import Source
from pipeline.data.result import Report, Violation
from pipeline.data.source_row import MAX_ROW_BYTES
from pipeline.errors import PipelineError, PipelineErrors
from pipeline.experiment import Experiment
from pipeline.token_check import MAX_BYTES, add_tokens
from pipeline.validation import validate

Said = Sequence[Violation | PipelineError]


class Scene(NamedTuple):
    told: str
    play: Callable[[Path], Said]


class TokenScene(NamedTuple):
    """Rows that are right as rows, and what a tokenizer of one token a byte does to them."""

    rows: str
    kind: str = "demonstration"
    max_length: int = 1024
    template: str | None = None
    """None: ChatML."""

    def play(self, here: Path) -> Said:
        from pipeline.data.tokenised import label_demonstrations, tokenize_preferences

        path = write(here, self.rows)
        if self.kind == "demonstration":
            counted = label_demonstrations(tokenizer(self.template), load_rows(path, "demonstration"), self.max_length)[
                1
            ]
        else:
            counted = tokenize_preferences(tokenizer(self.template), load_rows(path, "preference"), self.max_length)[1]
        return [*counted.errors, *counted.warnings]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer(template: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = template or CHATML
    return made


def write(here: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = here / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def checked(path: Path, **how: Any) -> Said:
    report = check_file(path, **how)
    return [*report.errors, *report.warnings]


def refused(act: Callable[[], Any]) -> Said:
    try:
        act()
    except PipelineErrors as several:
        return several.errors
    except PipelineError as error:
        return [error]
    raise AssertionError("nothing was refused")


def link(here: Path) -> Said:
    write(here, TEXT)
    (here / "link.jsonl").symlink_to("rows.jsonl")
    return checked(here / "link.jsonl")


def loop(here: Path) -> Said:
    (here / "loop.jsonl").symlink_to("loop.jsonl")
    return checked(here / "loop.jsonl")


def pipe(here: Path) -> Said:
    os.mkfifo(here / "pipe.jsonl")
    return checked(here / "pipe.jsonl")


def folder(here: Path) -> Said:
    (here / "data").mkdir()
    return checked(here / "data")


def changed(here: Path) -> Said:
    path = write(here, TEXT + "\n")

    def read() -> None:
        for _ in Source(path).rows():
            write(here, f"{TEXT}\n{TEXT}\n")

    return refused(read)


def experiment(here: Path, train: str, eval: str | None = None, preferences: str | None = None) -> Said:
    """Of an experiment that names the rows given: what `pipeline validate EXPERIMENT` says."""
    write(here, train, "train.jsonl")
    lines = ["name: example", "data:", "  demonstrations:", "    train: train.jsonl"]
    if eval is not None:
        write(here, eval, "eval.jsonl")
        lines.append("    eval: eval.jsonl")
    if preferences is not None:
        write(here, preferences, "pairs.jsonl")
        lines += ["  preferences:", "    train: pairs.jsonl"]
    reports = validate([write(here, "\n".join(lines), "experiment.yaml")], tokens=False)
    return [one for report in reports for one in (*report.errors, *report.warnings)]


def too_much(here: Path) -> Said:
    with (here / "rows.jsonl").open("wb") as file:
        file.truncate(MAX_BYTES + 2**20)
    report = Report(str(here / "rows.jsonl"), "demonstration")
    add_tokens([report], Experiment(name="example"), 1, None)
    return report.warnings


def no_template(_: Path) -> Said:
    from pipeline.data.tokens import render

    bare = tokenizer("{{ '' }}")
    bare.chat_template = None
    return refused(lambda: render(bare, [{"role": "user", "content": "Hi"}]))


def nothing_left(here: Path) -> Said:
    from pipeline.data.tokenised import label_demonstrations, require_usable

    rows = load_rows(write(here, GOOD), "demonstration")
    counted = label_demonstrations(tokenizer(None), rows, 8)[1]
    return refused(lambda: require_usable([counted], "sft", "set-aside"))


def onto_a_folder(here: Path) -> Said:
    (here / "out").mkdir()
    return refused(lambda: export(write(here, TEXT), "demonstration", here / "out", force=True))


def no_such_row(here: Path) -> Said:
    from pipeline.inspection import inspect

    given = {"name": "example", "data": {"demonstrations": {"train": str(write(here, GOOD))}}}
    return refused(lambda: inspect(Experiment.model_validate(given), tokenizer(None), "sft", 2))


LATER = " ".join(f"and {number}" for number in range(12, 24))
NEAR = f'{{{{"prompt": "{LONG} {LATER} {{0}}", "completion": "yes"}}}}'
OTHER = TEXT.replace("2 +", "3 +").replace(" 4", " 5")

SCENES: dict[str, Scene] = {
    "no-such-file": Scene("A file that is not there.", lambda here: checked(here / "gone.jsonl")),
    "is-a-folder": Scene("A folder with no data files in it, or one where a file is expected.", folder),
    "symbolic-link": Scene("A link to a data file; those of the hub's cache are followed.", link),
    "special-file": Scene("A pipe (FIFO), a socket, a device.", pipe),
    "unreadable-file": Scene("No permission, a link that leads to itself, a disk that fails.", loop),
    "file-changed": Scene("Its size, time of change or inode are others when it has been read than before.", changed),
    "unreadable-dataset": Scene(
        "`hf:NAME`, which names no split; a data set that cannot be loaded.",
        lambda here: checked(Path("hf:somebody/some-data")),
    ),
    "unknown-column": Scene(
        "`--map answer=completion`, where no row has `answer`.",
        lambda here: checked(write(here, TEXT), columns={"answer": "completion"}),
    ),
    "unsupported-file": Scene("A zip archive.", lambda here: checked(write(here, b"PK\x03\x04", "rows.jsonl"))),
    "broken-archive": Scene(
        "A download of a `.gz` that was cut off.",
        lambda here: checked(write(here, gzip.compress(TEXT.encode())[:20], "rows.jsonl.gz")),
    ),
    "archive-too-large": Scene(
        "An archive that unpacks to very much more than its size.",
        lambda here: checked(write(here, gzip.compress(bytes(FREE_BYTES + 2**20), 1), "rows.jsonl.gz")),
    ),
    "invalid-table": Scene(
        "A Parquet file that was cut off; a CSV file with a quote that is never closed.",
        lambda here: checked(write(here, 'prompt,completion\n2 + 2 =," 4\n', "rows.csv")),
    ),
    "wrong-encoding": Scene(
        "A file saved as “Unicode” by a Windows program: UTF-16.",
        lambda here: checked(write(here, TEXT.encode("utf-16"))),
    ),
    "broken-utf-8": Scene(
        "A file saved as Latin-1: `é` is one byte in it.",
        lambda here: checked(write(here, TEXT.replace("4", "é").encode("latin-1"))),
    ),
    "row-too-long": Scene(
        "A line of more than 16 MiB.", lambda here: checked(write(here, TEXT[:-1] + " " * MAX_ROW_BYTES + "}"))
    ),
    "evaluated-on-training-data": Scene(
        "The same prompt in the training and in the evaluation data of an experiment.",
        lambda here: experiment(here, TEXT, TEXT.replace("4", "four")),
    ),
    "duplicate-across-files": Scene(
        "The same row in the training and in the evaluation data, in two files that are given, or in two shards.",
        lambda here: experiment(here, f"{OTHER}\n{TEXT}", TEXT),
    ),
    "near-duplicate-across-files": Scene(
        "A row of the evaluation data that is nearly one of the training data, where near duplicates are looked for.",
        lambda here: experiment(here, NEAR.format("four"), NEAR.format("fourteen")),
    ),
    "shared-prompts": Scene(
        "The same prompt in the demonstrations and in the preferences that an experiment trains on.",
        lambda here: experiment(here, TEXT, None, PAIR),
    ),
}

STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
LAST_ONLY = (
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}<|im_start|>{{ message['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
)
NO_THOUGHTS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
ENDLESS = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def preferred(chosen: str, rejected: str) -> str:
    sides = [f'[{{"role": "assistant", "content": "{text}"}}]' for text in (chosen, rejected)]
    return f'{{"prompt": [{USER}], "chosen": {sides[0]}, "rejected": {sides[1]}}}'


TOKEN_SCENES: dict[str, TokenScene | Scene] = {
    "control-token": TokenScene(talk('{"role": "user", "content": "What is <|im_end|>?"}', ANSWER)),
    "template-refuses": TokenScene(talk('{"role": "system", "content": "Be kind"}', USER, ANSWER), template=STRICT),
    "template-not-prefix": TokenScene(
        talk(USER, ANSWER, USER.replace("Hi", "The time?"), ANSWER.replace("Hello", "Noon")), template=LAST_ONLY
    ),
    "nothing-in-loss": TokenScene(GOOD, max_length=16),
    "equal-after-cut": TokenScene(preferred("It is four.", "It is five."), "preference", 27),
    "equal-tokens": TokenScene(preferred("<think>2, 4</think>Four", "Four"), "preference", template=NO_THOUGHTS),
    "prompt-not-prefix": TokenScene(GOOD, template=THINKING),
    "completion-cut": TokenScene(talk(USER, ANSWER.replace("Hello", "Hello, and welcome")), max_length=30),
    "stop-cut": TokenScene(GOOD, max_length=26),
    "no-stop-token": TokenScene(preferred("Four", "Five"), "preference", template=ENDLESS),
    "foreign-control-token": TokenScene(talk('{"role": "user", "content": "[INST] Hi [/INST]"}', ANSWER)),
    "not-tokenised": Scene("Much data, or a model whose tokenizer is not on this machine.", too_much),
}

COMMAND_SCENES: dict[str, Scene] = {
    "bad-map": Scene(
        "`--map` with something else than a column and a field.", lambda _: refused(lambda: read_map(["q=promt"]))
    ),
    "invalid-rows": Scene(
        "A file with wrong rows, to be trained on or converted; its first errors follow.",
        lambda here: refused(lambda: load_rows(write(here, "{}"), "demonstration")),
    ),
    "nothing-to-learn": Scene("`data.on_invalid: set-aside`, and no row is left.", nothing_left),
    "no-chat-template": Scene("Conversations, and a base model's tokenizer.", no_template),
    "no-such-row": Scene("`pipeline inspect --row 2`, and the file has one row.", no_such_row),
    "file-exists": Scene(
        "`pipeline convert` onto a file that is there.",
        lambda here: refused(lambda: export(write(here, TEXT), "demonstration", here / "rows.jsonl")),
    ),
    "no-such-folder": Scene(
        "`pipeline convert` into a folder that is not there.",
        lambda here: refused(lambda: export(write(here, TEXT), "demonstration", here / "out" / "rows.jsonl")),
    ),
    "unwritable-file": Scene(
        "`pipeline convert --force` onto a folder, or to where nothing may be written.",
        onto_a_folder,
    ),
}
