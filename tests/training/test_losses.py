"""Every loss of TRL's DPOTrainer by its name, through `run_dpo`, with its value at step 0 derived by hand.

At step 0 the log-ratios of chosen and rejected are 0; the sigmoid there is 1/2, minus its logarithm ln 2. So TRL 1.16's
losses read: ipo (0 - 1/2β)²; exo_pair with ε: the KL of (1/2, 1/2) from (1-ε, ε); nca_pair ln 2 + ln 2 / 2 + ln 2 / 2;
sppo_hard 2 (1/2β)²; discopop, whose mixing is 1/2: (ln 2 + 1) / 2; apo_zero and apo_down 1/2 + 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.errors import PipelineError
from pipeline.experiment import LossType
from pipeline.experiment_file import load_experiment
from pipeline.training import dpo as dpo_module
from pipeline.training.dpo import run_dpo

LN2 = math.log(2)
BETA, EPSILON = 0.5, 0.1
AT_ZERO = {
    "sigmoid": LN2,
    "hinge": 1.0,
    "ipo": 1.0,
    "exo_pair": 0.5 * (math.log(0.5) - math.log(1 - EPSILON)) + 0.5 * (math.log(0.5) - math.log(EPSILON)),
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (LN2 + 1) / 2,
    "sft": None,  # no reference in it: the mean nats of a chosen token
    "sigmoid_norm": LN2,
}


@pytest.fixture(scope="module")
def start(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "sft"
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).save_pretrained(folder)
    return folder


@pytest.fixture
def train(write_experiment: Callable[..., Path], start: Path, tmp_path: Path, console: Any) -> Callable[..., Any]:
    def run(**dpo: Any) -> Any:
        short = {"max_steps": 1, "warmup_steps": 0, "save_strategy": "no", "eval_strategy": "no", "beta": BETA}
        path = write_experiment(dpo={**short, **dpo})
        return run_dpo(load_experiment(path).experiment, tmp_path / "runs", console, start=str(start))

    return run


def test_every_loss_is_here() -> None:
    assert set(AT_ZERO) == set(get_args(LossType))


@pytest.mark.parametrize("loss", AT_ZERO)
def test_a_loss_trains_from_its_value_at_zero(train: Callable[..., Any], loss: str) -> None:
    smoothed = {"label_smoothing": EPSILON} if loss in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
    reference = train(loss_type=loss, **smoothed).more["reference"]
    assert reference["drift"] == 0.0
    expected = AT_ZERO[loss]
    if expected is None:
        assert 1.0 < reference["start_loss"] < 50.0
    else:
        assert reference["start_loss"] == pytest.approx(expected, abs=1e-3)


def test_a_mixture_is_the_weighted_sum(train: Callable[..., Any]) -> None:
    mixed = train(loss_type=["sigmoid", "ipo"], loss_weights=[2.0, 0.5]).more["reference"]["start_loss"]
    assert mixed == pytest.approx(2 * LN2 + 0.5, abs=1e-3)


def test_what_trl_refuses_for_this_model_is_said_in_our_words(train: Callable[..., Any]) -> None:
    with pytest.raises(PipelineError, match="TRL refuses this configuration: `router_aux_loss_coef` is set") as caught:
        train(options={"router_aux_loss_coef": 0.1})
    assert caught.value.code == "refused-option"


def test_a_defect_of_ours_is_no_refusal_of_trl(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor is TRL's, and calls code of ours, which breaks."""
    defect: dict[str, Any] = {"__name__": "pipeline.somewhere"}
    exec("def called(*given, **more): raise ValueError('a defect')", defect)
    monkeypatch.setattr(dpo_module._Trainer, "_prepare_dataset", defect["called"])
    with pytest.raises(ValueError, match="a defect"):
        train()
