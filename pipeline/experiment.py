"""The experiment definition: one YAML file that binds model, tokenizer, data, scope, rhythm and evaluation.

These models are the single source: `schemas/experiment.schema.json` is generated from them (see
`experiment_schema`), and every key that has a counterpart in PEFT, TRL or Transformers carries its name and
meaning. Reading a file into them, with places and suggestions for what is wrong, is `experiment_file`'s.

Types are exact: a whole number is fine where a number is wanted, nothing else is converted.
"""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from pipeline.data.columns import FieldName

Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

# fmt: off
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]
# fmt: on
"""The losses of TRL's DPOTrainer."""
_LABEL_SMOOTHING = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""TRL's other losses ignore `label_smoothing` without a word."""
_F_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""The losses on the difference of rewards, where the normaliser of another divergence than KL cancels."""


DpoAdapter = Literal["continue", "new", "frozen"]
_INITS = {"gaussian", "orthogonal", "olora", "pissa"}
"""PEFT's `init_lora_weights` by name that both stages carry through; the next two say why others are not."""
_INITS_OF_DATA = {"eva", "corda", "lora_ga"}
_REWRITING_INITS = ("olora", "pissa")


def _refuse(cause: str, mend: str, *at: str, code: str = "conflict") -> PydanticCustomError:
    """An error of ours: `at` leads from the model that raises it to the key at fault."""
    return PydanticCustomError(code, "{cause}", {"cause": cause, "mend": mend, "at": at})


def _steps_or_unset(max_steps: int) -> int:
    if max_steps == 0:
        raise _refuse(
            "`max_steps` is a positive number of steps, or -1 for whole epochs; got 0",
            "give the number of steps, or remove the line to train for `num_train_epochs`",
            code="out-of-range",
        )
    return max_steps


def _regex(pattern: str) -> str:
    try:
        with warnings.catch_warnings():  # a pattern's style is its author's
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except re.error as error:
        at = "" if error.pos is None else f" at character {error.pos + 1} of {len(pattern)}"
        cause = f"not a regular expression: {error.msg}{at}: {pattern}"
    except (OverflowError, RecursionError):
        cause = f"not a usable regular expression, a repeat or its nesting is too large: {pattern}"
    else:
        return pattern
    mend = "write it as Python's `re` reads it, in single quotes, where YAML leaves backslashes alone"
    raise _refuse(cause, mend, code="bad-regex")


Regex = Annotated[str, AfterValidator(_regex)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(_Section):
    """The base model and how it is loaded."""

    id: Text = "builtin:smollm2-135m"
    """A hub id, a local folder, a `.gguf` file or `builtin:smollm2-135m`; paths are relative to this file."""
    revision: Text | None = None
    """The commit, tag or branch of a hub id. A run records the commit that it resolves to."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights; `auto`: bfloat16 on a GPU that has it, float32 elsewhere."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` loads the base in 4 bits with bitsandbytes (QLoRA)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto`: CUDA, else MPS, else the CPU."""
    attn_implementation: Text | None = None
    """As in Transformers (`sdpa`, `eager`, `flash_attention_2`, …); null: its own choice."""
    trust_remote_code: bool = False
    """Runs Python code that comes with a hub model. Recorded in the run."""


class Tokenizer(_Section):
    """The tokenizer is the model's own."""

    chat_template: Text | None = None
    """A Jinja file to use in place of the model's own chat template; null: the model's own."""


class Split(_Section):
    """Data files of one kind."""

    train: Text
    """The file that is trained on, relative to this file."""
    eval: Text | None = None
    """Held-out rows of the same kind."""
    map: dict[Text, FieldName] = Field(default_factory=dict)
    """Columns of both files that have names of their own, and the field that each stands for: `question: prompt`."""

    @model_validator(mode="after")
    def _one_column_a_field(self) -> Self:
        fields = list(self.map.values())
        for column, field in self.map.items():
            if fields.count(field) > 1:
                raise _refuse(f"two columns stand for the field `{field}`", "keep one of the two", "map", column)
        return self


class Data(_Section):
    """Every row is proven against its JSON Schema before a model is loaded."""

    demonstrations: Split | None = None
    """SFT rows: `messages`, or `prompt` and `completion`."""
    preferences: Split | None = None
    """DPO rows: `prompt`, `chosen` and `rejected`."""
    on_invalid: Literal["refuse", "set-aside"] = "refuse"
    """What becomes of rows that cannot be trained on: `refuse` ends before a model is loaded; `set-aside` trains
    without them, and writes each with its reasons to `set-aside.jsonl` in the run folder."""

    def columns(self, path: str, kind: str) -> dict[str, str]:
        """The `map` that the file `path` is read with: that of the split of its kind, where the split names it."""
        split = self.demonstrations if kind == "demonstration" else self.preferences
        named = [] if split is None else [Path(file) for file in (split.train, split.eval) if file is not None]
        return dict(split.map) if split is not None and Path(path) in named else {}


class Lora(_Section):
    """The adapter; names and meaning are PEFT's `LoraConfig`."""

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that SFT trains as well. Policy and reference share them, so DPO holds them still."""
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Text = True
    """`true`, `false`, `gaussian`, `orthogonal`, `olora`, `pissa` or `pissa_niter_16`. An adapter that `olora` or
    `pissa` started is saved as a plain LoRA of twice the rank, which opens on the base as it is."""
    target_modules: Literal["qv", "qkvo", "all-linear"] | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """`qv`, `qkvo`, `all-linear` (every linear layer but the head), or a list of module names."""
    layers: Literal["all", "last-half"] | Annotated[list[NonNegativeInt], Field(min_length=1)] = "all"
    """Which blocks carry the adapter."""

    @model_validator(mode="after")
    def _init(self) -> Self:
        init = self.init_lora_weights
        if isinstance(init, bool):
            return self
        if init in _INITS_OF_DATA:
            raise _refuse(
                f"`init_lora_weights: {init}` is computed from batches of data before training, which no stage does",
                "use `true`, `orthogonal` or `pissa`",
                "init_lora_weights",
            )
        if init == "loftq":
            raise _refuse(
                "`init_lora_weights: loftq` quantises the base in its own way, and the adapter fits that base alone",
                "use `model.quantize: nf4` with `init_lora_weights: true`",
                "init_lora_weights",
            )
        if init not in _INITS and not re.fullmatch(r"pissa_niter_\d+", init):
            close = difflib.get_close_matches(init, sorted(_INITS), n=1)
            raise _refuse(
                f"`init_lora_weights` must be true, false, {', '.join(sorted(_INITS))} or pissa_niter_N; got `{init}`",
                f"did you mean `{close[0]}`?" if close else "write one of them",
                "init_lora_weights",
                code="unknown-value",
            )
        if init == "orthogonal" and self.r % 2:
            raise _refuse(
                f"`init_lora_weights: orthogonal` needs an even rank; `r` is {self.r}", f"set `r: {self.r + 1}`", "r"
            )
        if self.use_dora and init.startswith(_REWRITING_INITS):
            raise _refuse(
                f"`init_lora_weights: {init}` is saved as a difference of two LoRAs, which `use_dora` does not allow",
                "remove one of the two",
                "use_dora",
            )
        return self


class Unfreeze(_Section):
    """Weights of the base that are opened beside the adapter, at a learning rate of their own."""

    last_blocks: NonNegativeInt = 0
    """How many of the last transformer blocks are trained whole."""
    final_norm: bool = False
    lm_head: bool = False
    """Opening a tied head unties it."""
    learning_rate: PositiveFloat = 5.0e-6

    @property
    def opens(self) -> bool:
        """Whether anything is opened at all."""
        return bool(self.last_blocks or self.final_norm or self.lm_head)


class Scope(_Section):
    """What is trainable."""

    lora: Lora | None = Lora()
    """Null: no LoRA, opened weights train alone."""
    unfreeze: Unfreeze = Unfreeze()
    """For both stages; a stage's own `unfreeze` replaces it."""


class _Stage(_Section):
    num_train_epochs: PositiveFloat = 1.0
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(_steps_or_unset)] = -1
    """If positive, the number of optimizer steps; overrides `num_train_epochs`."""
    learning_rate: PositiveFloat = 2.0e-4
    """Peak learning rate of the adapter."""
    per_device_train_batch_size: PositiveInt = 8
    per_device_eval_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool | Literal["auto"] = False
    """Computes activations again in the backward pass and keeps few; `auto`: where the memory does not hold them."""
    max_length: PositiveInt = 1024
    """Tokens; a longer row is cut at its end."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: NonNegativeFloat = 0.0
    """A number of steps, or below 1 a share of all steps."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    logging_steps: PositiveInt = 1
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    eval_steps: PositiveInt | None = None
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_steps: PositiveInt | None = None
    save_total_limit: PositiveInt | None = 2
    """How many checkpoints are kept; two at least, since the newest may turn out damaged."""
    unfreeze: Unfreeze | None = None
    """Replaces `scope.unfreeze` for this stage."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Any other field of TRL's configuration, handed through; checked before anything is loaded."""

    @model_validator(mode="after")
    def _intervals(self) -> Self:
        for what in ("eval", "save"):
            strategy, steps = f"{what}_strategy", f"{what}_steps"
            if getattr(self, strategy) == "steps" and getattr(self, steps) is None:
                raise _refuse(f"`{strategy}: steps` needs `{steps}`", f"add `{steps}: 100`", strategy)
            if getattr(self, steps) is not None and strategy not in self.model_fields_set:
                raise _refuse(f"`{steps}` has no effect without `{strategy}: steps`", f"add `{strategy}: steps`", steps)
        return self


class Sft(_Stage):
    """Phase one: supervised fine-tuning with TRL's SFTTrainer."""


class Dpo(_Stage):
    """Phase two: direct preference optimisation with TRL's DPOTrainer on the SFT adapter."""

    adapter: DpoAdapter = "continue"
    """`continue` trains the SFT adapter on; `new` trains a fresh LoRA (of `scope.lora`) on top of it; `frozen` trains
    what `unfreeze` opens, and no adapter. The reference is the SFT adapter each time."""
    beta: PositiveFloat = 0.1
    """How far the policy may move from the reference (Rafailov et al. 2023, equation 7)."""
    loss_type: LossType | Annotated[list[LossType], Field(min_length=1)] = "sigmoid"
    """One of TRL's losses, or a list of them to be summed."""
    loss_weights: list[FiniteFloat] | None = None
    """One weight for each loss in `loss_type`; null: 1 for each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The probability that a preference label is flipped."""
    learning_rate: PositiveFloat = 5.0e-5
    """Peak learning rate of the adapter."""

    @model_validator(mode="after")
    def _losses(self) -> Self:
        losses = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        divergence = self.options.get("f_divergence_type", "reverse_kl")
        if self.loss_weights is not None and len(self.loss_weights) != len(losses):
            raise _refuse(
                f"`loss_weights` has {len(self.loss_weights)} numbers for {len(losses)} in `loss_type`",
                "give one weight for each loss, or remove `loss_weights`",
                "loss_weights",
            )
        if len(set(losses)) < len(losses):
            raise _refuse(
                f"`loss_type` names a loss twice: {', '.join(losses)}",
                "name each once, and weigh them with `loss_weights`",
                "loss_type",
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise _refuse(
                "every weight in `loss_weights` is 0, so nothing would train", "give one above 0", "loss_weights"
            )
        if "exo_pair" in losses and self.label_smoothing == 0:
            raise _refuse(
                "the loss `exo_pair` takes the logarithm of `label_smoothing`, which is 0",
                "set `label_smoothing: 0.001`",
                "label_smoothing" if "label_smoothing" in self.model_fields_set else "loss_type",
            )
        if self.label_smoothing > 0 and not _LABEL_SMOOTHING.intersection(losses):
            raise _refuse(
                f"`label_smoothing` has no effect with `loss_type: {', '.join(losses)}`",
                "use `loss_type: robust`, or remove `label_smoothing`",
                "label_smoothing",
            )
        if divergence != "reverse_kl" and not _F_DIVERGENCE.issuperset(losses):
            raise _refuse(
                f"`f_divergence_type: {divergence}` is not defined for `loss_type: {', '.join(losses)}`",
                "remove it, or use the loss `sigmoid`",
                "options",
                "f_divergence_type",
            )
        for option, needs, given in (
            ("discopop_tau", "loss_type: discopop", "discopop" in losses),
            ("f_alpha_divergence_coef", "f_divergence_type: alpha_divergence", divergence == "alpha_divergence"),
        ):
            if option in self.options and not given:
                raise _refuse(
                    f"`{option}` has no effect without `{needs}`", f"remove it, or use `{needs}`", "options", option
                )
        tau, alpha = self.options.get("discopop_tau"), self.options.get("ld_alpha")
        for option, value, allowed, inside in (
            ("discopop_tau", tau, "above 0", not isinstance(tau, int | float) or tau > 0),
            ("ld_alpha", alpha, "from 0 to 1", not isinstance(alpha, int | float) or 0 <= alpha <= 1),
        ):
            if not inside:
                raise _refuse(
                    f"`{option}` must be {allowed}; got {value}",
                    f"give a number {allowed}",
                    "options",
                    option,
                    code="out-of-range",
                )
        if self.options.get("use_weighting") and {"aot", "aot_unpaired"}.intersection(losses):
            raise _refuse(
                "`use_weighting` weighs pairs, which the losses `aot` and `aot_unpaired` take apart",
                "remove it, or use the loss `sigmoid`",
                "options",
                "use_weighting",
            )
        return self


class Engine(_Section):
    """How training is computed. The curve stays TRL's: exactly, or within 5e-3 of the loss where `fast` rounds."""

    precision: Literal["auto", "exact", "fast"] = "auto"
    """How float32 matrices are multiplied. `exact`: with float32's own error. `fast`: gradients from factors rounded to
    bfloat16, on a CPU that multiplies it; on CUDA everything in TF32. `auto`: `fast` on a CPU, else `exact`.
    Half-precision weights (`model.dtype`) are multiplied as they are."""
    trunk_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    """Where DPO keeps the output of the blocks below everything that trains, so that they are computed once a row.
    `auto`: in memory, if a quarter of what is free holds it. What is kept goes with the run."""


class Check(_Section):
    """One thing that an answer must hold to."""

    must_match: Regex | None = None
    """A regular expression (Python's `re`, searched)."""
    must_not_match: Regex | None = None
    """The same, and it is nowhere in the answer."""
    must_contain: Text | None = None
    """A text that stands in the answer, letter for letter."""
    must_not_contain: Text | None = None
    """A text that does not."""
    equals_reference: Literal[True] | None = None
    """The answer is the reference answer, white space around it aside."""
    min_words: PositiveInt | None = None
    max_words: PositiveInt | None = None
    """Words as white space parts them; `min_words` and `max_words` may stand together."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        words = given == ["min_words", "max_words"]
        if len(given) != 1 and not words:
            kinds = ", ".join(f"`{name}`" for name in type(self).model_fields)
            raise _refuse(
                f"a check asks for exactly one thing; this one gives {' and '.join(given) or 'none'}",
                f"keep one of {kinds}, and write the others as checks of their own",
            )
        if words and (self.min_words or 0) > (self.max_words or 0):
            raise _refuse("`min_words` is more than `max_words`, so that no answer passes", "swap them", "min_words")
        return self


class Judge(_Section):
    """A model behind an endpoint that speaks OpenAI's chat completions, asked which of two answers is better."""

    base_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@?#]+$")]
    """Up to and without `/chat/completions`."""
    model: Text
    """As the endpoint names it."""
    key_env: Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]*$")] = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is written nowhere."""
    instruction: Text = (
        "Compare two answers to one question. Correctness counts most, then how well the answer does what was asked, "
        "then brevity."
    )
    """What the judge is told to look at."""


class LmEval(_Section):
    """Tasks of the lm-evaluation-harness (the extra `lm-eval`); names and meaning are its own."""

    tasks: Annotated[list[Text], Field(min_length=1)]
    """Tasks, groups, or patterns of them: `hellaswag`, `mmlu_*`."""
    limit: PositiveInt | None = None
    """Asks the first so many rows of each task only; null: all."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question; null: as the task says."""
    batch_size: PositiveInt = 8
    apply_chat_template: bool = False
    """Asks through the tokenizer's chat template."""
    include_path: Text | None = None
    """A folder of tasks of your own. A task may name Python functions beside it, which lm-eval runs."""


class Evaluation(_Section):
    """What `compare` asks of the base and of each run."""

    prompts: Text | None = None
    """Held-out demonstration rows: the prompt is asked, the last assistant turn is the reference answer."""
    max_prompts: PositiveInt | None = None
    """Asks the first so many only; null: all."""
    max_new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 25
    temperature: NonNegativeFloat = 0.0
    """0: greedy; above, answers are drawn, each prompt with random numbers of its own that `seed` decides."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws only from the most likely tokens that together have this probability."""
    regression: bool = True
    """Also scores the general questions that are shipped, to see what was forgotten."""
    output_schema: Text | None = None
    """A JSON Schema file that an answer, read as JSON, must conform to."""
    match: list[Text] = Field(default_factory=list)
    """Fields of the JSON answer that must equal the reference's."""
    checks: dict[Name, Check] = Field(default_factory=dict)
    lm_eval: LmEval | None = None
    """Also puts tasks of the lm-evaluation-harness to each version."""
    judge: Judge | None = None
    """Also lets a judge compare each version's answers with those of the version before it."""


class Wandb(_Section):
    """Weights & Biases mirrors a run's metrics; `metrics.jsonl` is the truth."""

    project: str | None = None
    """Null: the experiment's name."""
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online where a key is set, offline elsewhere."""


class Tracking(_Section):
    """Where metrics go beside the run folder."""

    wandb: Wandb = Wandb()
    tensorboard: bool = False
    """Writes the same figures as event files to `tensorboard/` in the run folder; needs the package `tensorboard`."""
    samples: NonNegativeInt = 4
    """How many held-out prompts are answered at each evaluation, to be looked at: the first of `evaluation.prompts`, or
    of the stage's own held-out rows. Greedy, up to `evaluation.max_new_tokens`. 0: none."""


class Experiment(_Section):
    """One experiment: both phases and their evaluation."""

    name: Name
    """Names the folder under `checkpoints/`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    scope: Scope = Scope()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        """A stage with no held-out rows is not evaluated; asking for it is an error."""
        for stage, kind in (("sft", "demonstrations"), ("dpo", "preferences")):
            settings: _Stage = getattr(self, stage)
            split: Split | None = getattr(self.data, kind)
            if settings.eval_strategy == "no" or (split is not None and split.eval is not None):
                continue
            if "eval_strategy" in settings.model_fields_set:
                raise _refuse(
                    f"`{stage}.eval_strategy: {settings.eval_strategy}` needs rows to evaluate on",
                    f'name a file in `data.{kind}.eval`, or set `eval_strategy: "no"`',
                    stage,
                    "eval_strategy",
                )
            self.__dict__[stage] = settings.model_copy(update={"eval_strategy": "no"})  # frozen for others
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        """What can be told without the model of what could not train, or could not be saved."""
        lora, opens = self.scope.lora, {stage: self.unfreeze_of(stage)[0].opens for stage in ("sft", "dpo")}
        if self.dpo.adapter == "frozen" and not opens["dpo"]:
            raise _refuse(
                "`dpo.adapter: frozen` trains opened weights alone, and `dpo.unfreeze` opens none",
                "add `unfreeze: {last_blocks: 4, final_norm: true}` under `dpo:`, or use `adapter: continue`",
                "dpo",
                "adapter",
            )
        if lora is None:
            if self.data.demonstrations is not None and not opens["sft"]:
                raise _refuse(
                    "`scope.lora` is null and SFT opens no weights, so nothing would train",
                    "give `lora` its keys (`lora: {r: 8}`), or open weights under `unfreeze`",
                    "scope",
                    "lora",
                )
            if self.dpo.adapter == "new":
                raise _refuse(
                    "`dpo.adapter: new` trains a fresh LoRA, and `scope.lora` is null",
                    "give `scope.lora` its keys, or use `adapter: continue`",
                    "dpo",
                    "adapter",
                )
            return self
        if lora.bias != "none" and opens["sft"]:
            raise _refuse(
                f"`bias: {lora.bias}` beside opened weights is not supported: opened blocks train their own biases",
                "remove `bias`, or open nothing in SFT",
                "scope",
                "lora",
                "bias",
            )
        no_sum = lora.use_dora and self.dpo.adapter != "continue"
        if no_sum or (self.dpo.adapter == "new" and lora.bias != "none"):
            key = "use_dora" if no_sum else "bias"
            raise _refuse(
                f"`dpo.adapter: {self.dpo.adapter}` makes SFT's adapter a part of a sum, which `{key}` does not allow",
                f"remove `{key}`, or use `adapter: continue`",
                "scope",
                "lora",
                key,
            )
        if self.model.quantize == "nf4" and str(lora.init_lora_weights).startswith(_REWRITING_INITS):
            raise _refuse(
                f"`init_lora_weights: {lora.init_lora_weights}` decomposes the base's weights, which nf4 has packed",
                "use `init_lora_weights: true`, or `quantize: none`",
                "scope",
                "lora",
                "init_lora_weights",
            )
        return self

    def unfreeze_of(self, stage: str) -> tuple[Unfreeze, str]:
        """What a stage (`sft`, `dpo`) opens, and the JSON pointer to where the experiment says so."""
        settings: _Stage = getattr(self, stage)
        if settings.unfreeze is not None:
            return settings.unfreeze, f"/{stage}/unfreeze"
        return self.scope.unfreeze, "/scope/unfreeze"
