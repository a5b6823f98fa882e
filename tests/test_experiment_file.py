"""Reading an experiment: places, traps, suggestions, overrides, paths, and writing it back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import ExitCode, PipelineError, PipelineErrors
from pipeline.experiment import Experiment
from pipeline.experiment_file import MAX_BYTES, LoadedExperiment, dump_experiment, load_experiment
from pipeline.experiment_keys import OTHER_NAMES, mend_for, sections
from pipeline.experiment_problems import MAX_PROBLEMS
from pipeline.yaml_places import MAX_DEPTH, pointer_to, read_yaml
from pipeline.yaml_scalars import needs_quotes, number_1_1, plain_1_2

ROOT = Path(__file__).parent.parent
Read = Callable[..., LoadedExperiment]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_text(text: str | bytes, *overrides: str) -> LoadedExperiment:
        path = tmp_path / "experiment.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_experiment(path, overrides)

    return read_text


def problems(read: Read, text: str | bytes, *overrides: str) -> list[PipelineError]:
    with pytest.raises(PipelineErrors) as caught:
        read(text, *overrides)
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value.errors


def problem(read: Read, text: str | bytes, *overrides: str) -> PipelineError:
    (only,) = problems(read, text, *overrides)
    return only


# Places


def test_every_key_has_its_line(read: Read) -> None:
    loaded = read("# a comment\nname: x\ndpo:\n  loss_type:\n  - sigmoid\n  - sft\n  options: {'a/b': 1}\n")
    places = {pointer: loaded.place(pointer) for pointer in ("/name", "/dpo", "/dpo/loss_type", "/dpo/loss_type/1")}
    assert places == {"/name": 2, "/dpo": 3, "/dpo/loss_type": 4, "/dpo/loss_type/1": 6}
    assert loaded.place("/dpo/options/a~1b") == 7
    assert loaded.place("/dpo/beta") is None
    assert loaded.place("/seed") is None


def test_a_later_problem_is_placed(read: Read) -> None:
    loaded = read("name: x\nsft:\n  options:\n    adam_beta1: 2\n", "model.id=org/model")
    placed = loaded.placed(PipelineError("m", code="c", mend="d", pointer="/sft/options/adam_beta1"))
    assert placed.place == f"{loaded.path}:4 /sft/options/adam_beta1"
    placed = loaded.placed(PipelineError("no such model", code="c", mend="d", pointer="/model/id"))
    assert (placed.file, placed.line) == (None, None)
    assert placed.message == "`--set model.id=org/model`: no such model"
    placed = loaded.placed(PipelineError("m", code="c", mend="d", pointer="/sft/beta/0"))
    assert placed.line == 2, "the section around it"


def test_all_problems_are_raised_together_in_the_order_of_lines(read: Read) -> None:
    text = "seed: -1\nmodel: {dtype: fp32}\ndpo:\n  bata: 1\n  beta: 1e-1\n  beta: 2\nsft: {options: {seed: 3}}\n"
    found = [(p.line, p.pointer, p.code) for p in problems(read, text)]
    assert found == [
        (1, "/name", "missing-key"),
        (1, "/seed", "out-of-range"),
        (2, "/model/dtype", "unknown-value"),
        (4, "/dpo/bata", "unknown-key"),
        (5, "/dpo/beta", "yaml-float"),
        (6, "/dpo/beta", "duplicate-key"),
        (7, "/sft/options/seed", "conflict"),
    ]


# Traps of YAML


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("sft: {learning_rate: 1e-4}", "yaml-float", "1.0e-4"),
        ("sft: {learning_rate: 1.0e4}", "yaml-float", "1.0e+4"),
        ("sft: {learning_rate: -.5}", "yaml-number", "-0.5"),
        ("sft: {options: {adam_epsilon: 1e-8}}", "yaml-float", "1.0e-8"),
        ("model: {revision: 1e10}", "yaml-float", '"1e10"'),
        ("model: {revision: 1234567}", "yaml-number", 'revision: "1234567"'),
        ("model: {revision: 1234.5}", "yaml-number", 'revision: "1234.5"'),
        ("model: {revision: 12:30}", "yaml-sexagesimal", "750"),
        ("model: {revision: 0123}", "yaml-octal", "83"),
        ("model: {revision: 089}", "yaml-number", "89"),
        ("model: {revision: 2024-01-31}", "yaml-date", '"2024-01-31"'),
        ("model: {revision: no}", "yaml-bool", 'revision: "no"'),
        ("sft: {eval_strategy: no}", "yaml-bool", 'eval_strategy: "no"'),
        ("sft: {save_strategy: No}", "unknown-value", "`no`"),
        ("model: {quantize: no}", "unknown-value", "`none`"),
        ("sft: {learning_rate: .inf}", "out-of-range", "finite"),
        ("sft: {learning_rate: 1.0e+999}", "out-of-range", "finite"),
        ("dpo: {loss_weights: [.nan]}", "out-of-range", "finite"),
        ("sft: {options: {a: [-.inf]}}", "out-of-range", "finite"),
        ("seed: " + "9" * 5000, "out-of-range", "shorter"),
        ("seed: 0x_", "out-of-range", "0x_"),
        ("seed: 0" + "7" * 9000, "out-of-range", "shorter"),
        ("model: {revision: " + "7" * 9000 + ":30}", "yaml-sexagesimal", "inf"),
        ("seed: 0x" + "f" * 5000, "out-of-range", "shorter"),
        ("evaluation: {checks: {no: {must_match: a}}}", "yaml-bool", '"no":'),
        ("evaluation: {checks: {12: {must_match: a}}}", "wrong-type", '"12":'),
        ("sft: {? [a] : 1}", "wrong-type", "plain text"),
        ('sft: {"a\\0": 1}', "yaml-syntax", "NUL"),
        ('model: {id: "\\ud800"}', "yaml-syntax", "surrogate"),
    ],
)
def test_a_trap_is_an_error(read: Read, line: str, code: str, says: str) -> None:
    found = problem(read, f"name: x\n{line}\n")
    assert (found.line, found.code) == (2, code)
    assert says in f"{found.message} {found.mend}"


def test_what_is_no_trap(read: Read) -> None:
    text = (
        "name: x\nseed: 1_000\nmodel: {revision: '1234567', trust_remote_code: yes, attn_implementation: ~}\n"
        'sft: {learning_rate: 1.0e-4, eval_strategy: "no", max_length: 0x100, options: {a: "1e-5", b: 5.}}\n'
    )
    made = read(text).experiment
    assert made.seed == 1000
    assert made.model.revision == "1234567"
    assert made.model.trust_remote_code is True
    assert (made.sft.learning_rate, made.sft.max_length, made.sft.eval_strategy) == (1e-4, 256, "no")
    assert made.sft.options == {"a": "1e-5", "b": 5.0}


def test_a_duplicate_key_names_both_lines(read: Read) -> None:
    found = problem(read, "name: x\ndpo:\n  beta: 0.1\n  loss_type: ipo\n  beta: 0.2\n")
    assert (found.code, found.line, found.pointer) == ("duplicate-key", 5, "/dpo/beta")
    assert "lines 3 and 5" in found.message


@pytest.mark.parametrize(
    ("text", "code", "line", "says"),
    [
        ("name: x\nsft: {a: [1\n", "yaml-syntax", 3, "column 1"),
        ("name: x\nsft:\n\tbeta: 1\n", "yaml-syntax", 3, "tabs"),
        ("name: x\nmodel: a: b\n", "yaml-syntax", 2, "quote"),
        ("name: x\nmodel: \x01\n", "yaml-syntax", 2, "U+0001"),
        ('name: x\nmodel: "\\U99999999"\n', "yaml-syntax", 2, "escape"),
        ("name: x\n---\nname: y\n", "yaml-documents", 2, "---"),
        ("name: &a x\nseed: *a\n", "yaml-alias", 1, "quotes"),
        ("name: *a\n", "yaml-alias", 1, "quotes"),
        ("name: x\nmodel: !!python/object:os.system {}\n", "yaml-tag", 2, "!!python/object:os.system"),
        ("name: !!str x\n", "yaml-tag", 1, "tag"),
        ("name: x\nsft: " + "[" * 1000 + "]" * 1000, "too-deep", 2, str(MAX_DEPTH)),
        ("name: x\nsft: " + "[" * 100_000, "too-deep", 2, str(MAX_DEPTH)),
        ("", "empty-file", 1, "name"),
        ("# nothing\n", "empty-file", 1, "name"),
        ("- a\n", "not-a-mapping", 1, "name"),
        ("just text\n", "not-a-mapping", 1, "name"),
        (b"name: x\nmodel: \xff\n", "not-utf8", 2, "UTF-8"),
        (b"\xff\xfen\0a\0", "not-utf8", 1, "UTF-8"),
        ("#" * (MAX_BYTES + 1), "too-large", None, "data"),
    ],
)
def test_what_is_no_experiment_file(read: Read, text: str | bytes, code: str, line: int | None, says: str) -> None:
    found = problem(read, text)
    assert (found.code, found.line) == (code, line)
    assert says in f"{found.message} {found.mend}"
    assert found.file is not None


def test_a_billion_laughs_are_refused_at_once(read: Read) -> None:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    start = time.perf_counter()
    assert problem(read, "\n".join(lines)).code == "yaml-alias"
    assert time.perf_counter() - start < 1


def test_a_byte_order_mark_is_no_problem(read: Read) -> None:
    assert read(b"\xef\xbb\xbfname: x\n").experiment.name == "x"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none.yaml", "file-missing"), (tmp_path, "not-a-file")):
        with pytest.raises(PipelineErrors) as caught:
            load_experiment(path)
        assert (caught.value.code, caught.value.file) == (code, str(path))


def test_a_file_of_something_else_does_not_drown_its_reader(read: Read) -> None:
    found = problems(read, "".join(f"k{n}: v\n" for n in range(5000)))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1].code == "too-many"


# Types, said in words


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ('dpo: {beta: "0.1"}', "wrong-type", "remove the quotes: beta: 0.1"),
        ('dpo: {learning_rate: "1e-4"}', "wrong-type", "remove the quotes: learning_rate: 1.0e-4"),
        ("sft: {max_length: 8.0}", "wrong-type", "write 8"),
        ("sft: {max_length: many}", "wrong-type", "a whole number; got the text `many`"),
        ("scope: {lora: {use_rslora: 1}}", "wrong-type", "true or false; got 1"),
        ("sft: {gradient_checkpointing: 1}", "unknown-value", "one of auto or true or false; got `1`"),
        ("sft:", "wrong-type", "remove the line"),
        ("sft: 3", "wrong-type", "section"),
        ("evaluation: {match: severity}", "wrong-type", "write [severity]"),
        ("dpo: {beta: 0}", "out-of-range", "greater than 0"),
        ("dpo: {beta: null}", "wrong-type", "nothing"),
        ("sft: {max_steps: 0}", "out-of-range", "-1"),
        ("seed: 4294967296", "out-of-range", "less than 4294967296"),
        ("model: {id: ''}", "out-of-range", "empty text"),
        ("model: {dtype: float8}", "unknown-value", "`float32`"),
        ("dpo: {loss_type: sigmod}", "unknown-value", "`sigmoid`"),
        ("dpo: {loss_type: [sigmoid, hing]}", "unknown-value", "item 2 of `loss_type`"),
        ("dpo: {loss_type: 3}", "unknown-value", "or a list"),
        ("scope: {lora: {target_modules: []}}", "conflict", "empty list"),
        ("scope: {lora: {target_modules: [q_proj, 3]}}", "yaml-number", "item 2 of `target_modules`"),
        ("scope: {lora: {target_modules: all_linear}}", "unknown-value", "`all-linear`"),
        ("scope: {lora: {layers: [1, -1]}}", "out-of-range", "item 2 of `layers`"),
        ("evaluation: {checks: {a b: {must_match: x}}}", "out-of-range", "`a b` is not a name"),
        ("evaluation: {checks: {a: {must_match: '('}}}", "bad-regex", "at character 1 of 1"),
        ("evaluation: {checks: {a: {}}}", "conflict", "gives none"),
        ("data: {preferences: {eval: x}}", "missing-key", "add `train:` under `data.preferences`"),
        ("sft: {eval_strategy: epoch}", "conflict", "data.demonstrations.eval"),
        ("dpo: {loss_type: ipo, loss_weights: [1, 2]}", "conflict", "2 numbers for 1"),
        ("dpo: {options: {sync_ref_model: true}}", "refused-option", "hold still"),
        ("sft: {options: {max_steps: 3}}", "conflict", "under `sft:` itself"),
    ],
)
def test_a_wrong_value_is_said_in_words(read: Read, line: str, code: str, says: str) -> None:
    found = problem(read, f"name: x\n{line}\n")
    assert (found.line, found.code) == (2, code)
    assert says in f"{found.message}; {found.mend}"


# Suggestions


@pytest.mark.parametrize(
    ("path", "key", "mend"),
    [
        ("dpo", "bata", "did you mean `beta`?"),
        ("sft", "beta", "`beta` belongs under `dpo`"),
        ("", "lora_r", "write it as `scope.lora.r`"),
        ("scope.lora", "lora_r", "write it as `scope.lora.r`"),
        ("sft", "epochs", "did you mean `num_train_epochs`?"),
        ("", "epochs", "write it as `sft.num_train_epochs` or `dpo.num_train_epochs`"),
        ("dpo", "lr", "did you mean `learning_rate`?"),
        ("sft", "batch_size", "did you mean `per_device_train_batch_size`?"),
        ("sft", "warmup_ratio", "use `warmup_steps`: a number below 1 is a share of all steps"),
        ("", "learning_rate", "`learning_rate` belongs under `sft` or `dpo`"),
        ("model", "name", "`name` belongs at the top level"),
        ("", "must_match", "`must_match` belongs under `evaluation.checks.NAME`"),
        ("evaluation.checks.c", "must_not_macth", "did you mean `must_not_match`?"),
        ("", "dpo.beta", "write `beta:` in the section `dpo:`; dotted keys are for `--set`"),
        ("tokenizer", "zzz", "the keys of tokenizer are chat_template"),
    ],
)
def test_a_wrong_key_gets_a_suggestion(path: str, key: str, mend: str) -> None:
    assert mend_for([part for part in path.split(".") if part], key) == mend


def test_a_field_of_trl_is_sent_to_options() -> None:
    assert mend_for(["sft"], "adam_beta1").startswith("other fields of TRL's SFTConfig go under `sft.options`")


def test_other_names_lead_to_keys_that_exist() -> None:
    known = {".".join((*path, key)) for path, keys in sections().items() for key in keys}
    leaves = {name.rpartition(".")[2] for name in known}
    for other, ours in OTHER_NAMES.items():
        assert ours in known | leaves, other
        assert other not in leaves - {"batch_size"}, f"{other} is a key of ours"


def test_added_tokens_are_refused_with_the_reason() -> None:
    for key in ("add_tokens", "additional_special_tokens", "resize_token_embeddings"):
        assert mend_for(["tokenizer"], key).startswith("adding tokens or resizing the embeddings is not supported")


def test_an_unknown_key_is_placed_at_the_key(read: Read) -> None:
    found = problem(read, "name: x\ndpo:\n  bata: 0.1\n")
    assert str(found) == (f"{found.file}:3 /dpo/bata: unknown key `bata` [unknown-key]\n  did you mean `beta`?")


# Overrides


def test_an_override_sets_a_value(read: Read) -> None:
    loaded = read(
        "name: x\ndpo: {beta: 0.1}\n",
        "dpo.beta=0.3",
        "dpo.beta=0.2",
        "dpo.loss_type=[sigmoid, sft]",
        "data.preferences.train=rows.jsonl",
        "model.revision=",
        "sft.options.lr_scheduler_kwargs.num_cycles=2",
        "sft.unfreeze={last_blocks: 1}",
    )
    made = loaded.experiment
    assert (made.dpo.beta, made.dpo.loss_type) == (0.2, ["sigmoid", "sft"])
    assert made.data.preferences is not None
    assert made.data.preferences.train == str(Path.cwd() / "rows.jsonl")
    assert made.model.revision is None
    assert made.sft.options == {"lr_scheduler_kwargs": {"num_cycles": 2}}
    assert made.sft.unfreeze is not None
    assert made.sft.unfreeze.last_blocks == 1
    assert loaded.place("/dpo/beta") is None, "the file does not give it"


def test_an_override_is_read_by_the_rules_of_yaml_1_2(read: Read) -> None:
    made = read("name: x\n", "sft.learning_rate=1e-4", "sft.save_strategy=no", "model.revision=12:30").experiment
    assert (made.sft.learning_rate, made.sft.save_strategy, made.model.revision) == (1e-4, "no", "12:30")


def test_an_override_of_a_section_takes_all_of_it(read: Read) -> None:
    loaded = read("name: x\ndpo:\n  beta: 0.3\n", "dpo={max_steps: 3}")
    assert (loaded.experiment.dpo.beta, loaded.experiment.dpo.max_steps) == (0.1, 3)
    assert loaded.place("/dpo/beta") is None


def test_an_override_takes_the_place_of_what_was_wrong(read: Read) -> None:
    assert read("name: x\ndpo: {beta: 1e-1}\n", "dpo.beta=0.2").experiment.dpo.beta == 0.2
    assert read("name: x\nsft: {max_length: []}\n", "sft.max_length=5").experiment.sft.max_length == 5


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("dpo.bata=0.2", "unknown-key", "unknown key `dpo.bata`; did you mean `dpo.beta`?"),
        ("dop.beta=0.2", "unknown-key", "unknown key `dop`; did you mean `dpo`?"),
        ("lora_r=4", "unknown-key", "write it as `scope.lora.r`"),
        ("dpo.beta", "bad-override", "KEY=VALUE"),
        ("=3", "bad-override", "KEY=VALUE"),
        ("dpo..beta=3", "bad-override", "KEY=VALUE"),
        ("name.x=3", "wrong-type", "`name` holds a value"),
        ("dpo.beta=[", "yaml-syntax", "not YAML"),
        ("dpo.beta=.nan", "out-of-range", "finite"),
        ("dpo.beta=-1", "out-of-range", "greater than 0"),
        ("dpo={beta: -1}", "out-of-range", "greater than 0"),
        ('dpo.beta="0.2"', "wrong-type", "remove the quotes: --set dpo.beta=0.2"),
        ("model.revision=12", "yaml-number", """--set 'model.revision="12"'"""),
        ("scope.lora.use_rslora=yes", "wrong-type", "true or false"),
        ("data.preferences={eval: x}", "missing-key", "`train`"),
        ("data.preferences.eval=x", "missing-key", "`train`"),
        ("sft.options.seed=3", "conflict", "top-level `seed`"),
    ],
)
def test_a_wrong_override_names_itself(read: Read, override: str, code: str, says: str) -> None:
    found = problem(read, "name: x\n", override)
    assert (found.file, found.line, found.code) == (None, None, code)
    assert found.message.startswith(f"`--set {override}`: ")
    assert says in f"{found.message}; {found.mend}"


# Paths


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments" / "here").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "experiments" / "a.yaml"
    path.write_text(
        "name: x\nmodel: {id: ./m}\ntokenizer: {chat_template: t.jinja}\n"
        "data:\n  demonstrations: {train: ../data/a.jsonl, eval: /abs/b.jsonl}\n  preferences: {train: ~/c.jsonl}\n"
        "evaluation: {prompts: p.jsonl, output_schema: here/s.json}\n"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    base = tmp_path.resolve()
    made = load_experiment(Path("../experiments/a.yaml"), ["tokenizer.chat_template=t.jinja"]).experiment
    assert made.model.id == str(base / "experiments/m")
    assert made.tokenizer.chat_template == str(base / "elsewhere/t.jinja")
    assert made.data.model_dump(exclude={"on_invalid"}) == {
        "demonstrations": {"train": str(base / "data/a.jsonl"), "eval": "/abs/b.jsonl", "map": {}},
        "preferences": {"train": "/home/someone/c.jsonl", "eval": None, "map": {}},
    }
    assert made.evaluation.prompts == str(base / "experiments/p.jsonl")
    assert made.evaluation.output_schema == str(base / "experiments/here/s.json")


def test_data_may_be_a_glob_or_the_name_of_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: x\ndata:\n  demonstrations: {train: 'hf:org/name:train', eval: 'shards/*.jsonl.gz'}\n"
        "  preferences: {train: shards/}\nevaluation: {prompts: 'hf:org/name:config:test[:100]'}\n"
    )
    made = load_experiment(path).experiment
    assert made.data.demonstrations is not None
    assert made.data.demonstrations.train == "hf:org/name:train"
    assert made.data.demonstrations.eval == str(tmp_path.resolve() / "shards/*.jsonl.gz")
    assert made.data.preferences is not None
    assert made.data.preferences.train == str(tmp_path.resolve() / "shards")
    assert made.evaluation.prompts == "hf:org/name:config:test[:100]"


@pytest.mark.parametrize(
    ("model", "local"),
    [
        ("builtin:smollm2-135m", False),
        ("org/model", False),
        ("gpt2", False),
        ("here", True),
        ("here/inner", True),
        ("model.gguf", True),
        ("../m", True),
        ("/m", True),
        ("~/m", True),
        ("~no-such-user-here/m", True),
    ],
)
def test_a_model_is_local_where_it_looks_so(tmp_path: Path, model: str, local: bool) -> None:
    (tmp_path / "here" / "inner").mkdir(parents=True)
    (tmp_path / "a.yaml").write_text(f"name: x\nmodel: {{id: '{model}'}}\n")
    made = load_experiment(tmp_path / "a.yaml").experiment
    assert (made.model.id != model or model.startswith("/")) == local
    assert Path(made.model.id).is_absolute() == local


def test_links_mean_what_opening_them_would(tmp_path: Path) -> None:
    """`link/../x` is beside the folder that `link` leads to; a linked file keeps its own name."""
    (tmp_path / "far" / "recipes").mkdir(parents=True)
    (tmp_path / "far" / "blob").write_text("")
    (tmp_path / "far" / "m.gguf").symlink_to("blob")
    (tmp_path / "near").symlink_to(tmp_path / "far" / "recipes")
    (tmp_path / "far" / "recipes" / "a.yaml").write_text("name: x\nmodel: {id: ../m.gguf}\n")
    made = load_experiment(tmp_path / "near" / "a.yaml").experiment
    assert made.model.id == str(tmp_path.resolve() / "far" / "m.gguf")


# Writing back

_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
_WORDS = st.sampled_from(["no", "1e-5", "12:30", "010", "08", "0o7", "~", "null", "2024-01-01", "a: b", "- a", "*x"])
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    positive = st.floats(1e-300, 1e300)
    return Experiment.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "model": {"revision": draw(st.none() | _TEXT | _WORDS), "trust_remote_code": draw(st.booleans())},
            "scope": {
                "lora": {
                    "target_modules": draw(st.just("qv") | st.lists(_TEXT | _WORDS, min_size=1, max_size=3)),
                    "lora_dropout": draw(st.floats(0, 1, exclude_max=True)),
                    "init_lora_weights": draw(st.booleans() | st.sampled_from(["gaussian", "pissa_niter_16"])),
                }
            },
            "sft": {
                "learning_rate": draw(positive),
                "eval_strategy": "no",
                "options": {
                    f"a{key}": value for key, value in draw(st.dictionaries(_TEXT, _PLAIN, max_size=3)).items()
                },
            },
            "dpo": {
                "beta": draw(positive),
                "loss_weights": draw(st.none() | st.tuples(st.floats(0.5, 9)).map(list)),
            },
            "evaluation": {
                "match": draw(st.lists(_TEXT | _WORDS, max_size=3)),
                "checks": {
                    "no": {"must_match": "1e-5|no"},
                    "1e5": {"must_not_match": r"\b\d+ 'x' \"y\"\s"},
                },
            },
            "tracking": {
                "wandb": {
                    "project": draw(
                        st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
                    )
                }
            },
        }
    )


@settings(max_examples=60, deadline=None)
@given(made=experiments())
def test_what_is_written_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, made: Experiment) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(dump_experiment(made), encoding="utf-8", newline="")
    assert load_experiment(path).experiment == made
    assert yaml.safe_load(path.read_bytes()) == json.loads(json.dumps(made.model_dump())), "and by others too"


def test_the_default_experiment_is_read_back_equal(read: Read) -> None:
    """With no data there is no evaluation, and the file says so in a way that is no conflict."""
    made = read("name: x\n").experiment
    text = dump_experiment(made)
    assert "eval_strategy: 'no'" in text
    assert "learning_rate: 5.0e-05" in text
    assert read(text).experiment == made


_SIGN = st.sampled_from(["", "-", "+"])


@given(
    st.builds(
        "{}{}{}{}".format,
        _SIGN,
        st.sampled_from(["5", "05", "5.", ".5", "0.25"]),
        st.sampled_from(["", "e", "E"]),
        _SIGN | st.just("3") | st.just("-3") | st.just("+12"),
    )
)
def test_the_form_that_is_suggested_for_a_number_is_that_number_everywhere(text: str) -> None:
    if needs_quotes(text):
        suggested = number_1_1(text)
        assert yaml.safe_load(suggested) == plain_1_2(text)
        assert plain_1_2(suggested) == plain_1_2(text)


# Whatever the file holds


def only_our_errors(text: str | bytes, path: Path, overrides: Sequence[str] = ()) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    start = time.perf_counter()
    try:
        loaded = load_experiment(path, overrides)
    except PipelineErrors as errors:
        for error in errors.errors:
            assert error.code
            assert error.mend
            assert str(error)
            json.dumps(error.as_dict())
    else:
        assert dump_experiment(loaded.experiment)
    assert time.perf_counter() - start < 5


_FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_RECIPE = (ROOT / "recipes" / "partial.yaml").read_text(encoding="utf-8").splitlines()
# fmt: off
_PIECES = st.sampled_from([
    "", " ", "  ", "\t", ":", ": ", "- ", "? ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!x ", "|", ">", "'",
    '"', "%YAML 1.1", "---", "...", "#", "<<: ", "null", "no", "1e-5", "0x_", "12:30", "=", "\\", "\x85",
    "\u2028", "\0", "a: 1", "1: 2", "~: 3", "dpo: []", "- a: b", "9" * 50, "0b_", "1__0", ".inf", "@", "`",
    "2001-01-01T00:00:00Z",
])
_KEYS = st.lists(st.sampled_from([
    "dpo", "sft", "beta", "scope", "lora", "r", "options", "a", "", " ", "no", "0", "checks", "evaluation", "model",
    "id", "name", "loss_type", "data", "preferences", "train",
]), max_size=4)
# fmt: on


@_FUZZ
@given(text=st.text(max_size=200) | st.lists(_PIECES, max_size=20).map("".join) | st.binary(max_size=100))
@example(text="? ? ? a")
@example(text="a: {b: c, <<: {d: e}}")
@example(text="!")
@example(text="! a")
@example(text="name: x\ndpo: {loss_type: {str: 1}, beta: " + "9" * 39 + "}")
def test_any_text_gives_our_errors_or_an_experiment(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    only_our_errors(text, tmp_path_factory.getbasetemp() / "fuzz.yaml")


@_FUZZ
@given(data=st.data())
def test_any_mutation_of_a_recipe_gives_our_errors_or_an_experiment(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = list(_RECIPE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "repeat", "value", "indent", "insert", "cut"]))
        line = lines[at]
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "repeat":
            lines.insert(data.draw(st.integers(0, len(lines))), line)
        elif kind == "value":
            lines[at] = (
                line.partition(":")[0] + ": " + data.draw(_PIECES | st.text(max_size=8) | _PLAIN.map(json.dumps))
            )
        elif kind == "indent":
            lines[at] = data.draw(st.sampled_from([" ", "  ", "\t"])) + line
        elif kind == "insert":
            place = data.draw(st.integers(0, len(line)))
            lines[at] = line[:place] + data.draw(_PIECES) + line[place:]
        else:
            lines[at] = line[: data.draw(st.integers(0, len(line)))]
    only_our_errors("\n".join(lines), tmp_path_factory.getbasetemp() / "recipe.yaml")


@_FUZZ
@given(
    overrides=st.lists(
        st.text(max_size=30)
        | st.builds("{}={}".format, _KEYS.map(".".join), _PIECES | st.text(max_size=8) | _PLAIN.map(json.dumps)),
        max_size=3,
    )
)
def test_any_override_gives_our_errors_or_an_experiment(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str]
) -> None:
    only_our_errors("name: x\ndpo: {beta: 0.1}\n", tmp_path_factory.getbasetemp() / "set.yaml", overrides)


@pytest.mark.parametrize(
    "text",
    [
        "name: [" + "1, " * (MAX_BYTES // 3 - 10),
        "".join(f"k{n}: v\n" for n in range(MAX_BYTES // 10)),
        "name: " + "x " * (MAX_BYTES // 2 - 10),
        "[" * (MAX_BYTES - 10),
        "- " * (MAX_BYTES // 2 - 10),
    ],
    ids=["list", "keys", "words", "open", "dashes"],
)
def test_the_longest_file_takes_seconds_at_most(tmp_path: Path, text: str) -> None:
    only_our_errors(text, tmp_path / "long.yaml")


# The rest


def test_pointers_are_escaped() -> None:
    assert pointer_to("a/b", "c~d", 3) == "/a~1b/c~0d/3"
    assert read_yaml("{a/b: {c~d: [1]}}").places.keys() == {"", "/a~1b", "/a~1b/c~0d", "/a~1b/c~0d/0"}


def test_numbers_are_read_as_pyyaml_reads_them() -> None:
    written = "[0, -1, 1_000, 0x1F, 0b11, 1.5, -1.0e-3, .5, 6.e+2, 1_0.5]"
    value = read_yaml(written).value
    assert value == yaml.safe_load(written)
    assert [type(number) for number in value] == [type(number) for number in yaml.safe_load(written)]
    assert math.isclose(value[6], -0.001)


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.experiment_file import load_experiment\n"
        "load_experiment(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'peft', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "recipes" / "triage.yaml")], check=True, cwd=ROOT)
