"""Saving a trainer's whole state, and putting it back so that the run goes on as if it had never stopped.

Trainer's own checkpoints leave out what it has summed up since the last logged step and what TRL counts; they are
written in place, file by file, and a missing or damaged file is met with other weights and not a word. Here a
checkpoint is made when nothing of its step is left to do, and put back to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from pipeline.errors import PipelineError
from pipeline.model.ground import Say
from pipeline.runs.checkpoints import COUNTERS, Checkpoint, new_checkpoint, rotate
from pipeline.runs.files import ADAPTER_WEIGHTS, write_atomically
from pipeline.runs.run import Run
from pipeline.training.callbacks import Guard, Recorder
from pipeline.training.generators import generator_states, set_generator_states
from pipeline.training.processes import agreed, gathered, is_first

_GENERATORS = "generators.pt"


class _EvaluationStopped(Exception):
    """A signal came while the run was evaluating."""


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Writes a run's checkpoints, and takes its trainer back to one.

    Args:
        trainer: a `Resumable`, before its loop.
        run: whose `state/` holds the checkpoints.
        recorder: its position belongs to a checkpoint.
        guard: what it has found is not saved over the last good state.
        say: tells the user one line.
        resumed: where the loop begins; None: at step 0.
    """

    def __init__(
        self, trainer: Any, run: Run, recorder: Recorder, guard: Guard, say: Say, resumed: Checkpoint | None
    ) -> None:
        self._trainer = trainer
        self._run = run
        self._recorder = recorder
        self._guard = guard
        self._say = say
        self._resumed = resumed
        self._pending: dict[str, Any] | None = None
        """Generator states of the checkpoint that are still to be put back."""
        self._epoch_began: dict[str, Any] = generator_states()
        """What the order of the running epoch was drawn from, if the sampler draws from the shared generators."""
        self._save_is_due = False
        self._owes_evaluation = False
        self._step_ids: list[torch.Tensor] = []
        """Token ids of the running step's micro-batches."""
        self.saved: int | None = None if resumed is None else resumed.step
        """The step of the newest checkpoint."""

    # What Trainer calls through `Resumable`.

    def save(self) -> None:
        """Writes a checkpoint of this step; where that fails, says so, and the run goes on with the one before."""
        trainer, step = self._trainer, self._trainer.state.global_step
        if self._guard.failure is not None or step == self.saved:
            return
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in _trained(trainer.model))
        if not finite:  # in all processes alike, whose weights are the same
            self._guard.fail("a trained weight", trainer.state, trainer.control)
            return
        # What all processes do together comes first; the first one writes.
        trainer.store_flos()
        states = gathered({"now": generator_states(), "epoch": self._epoch_began})
        sums = gathered(float(trainer._tr_loss))
        if is_first():
            self._keep(step, states, sums)
        self.saved = gathered(self.saved)[0]

    def load_policy(self, folder: Path) -> None:
        """The policy's weights of a checkpoint, in place of those that training began with.

        Raises:
            PipelineError: they are another model's.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        weights = load_file(folder / ADAPTER_WEIGHTS)
        try:
            set_peft_model_state_dict(model, weights)
            held = get_peft_model_state_dict(model, save_embedding_layers=False)
            same = held.keys() == weights.keys()
            same = same and all(torch.equal(held[name].cpu(), weights[name]) for name in weights)
        except RuntimeError:  # other shapes, other types
            same = False
        if not same:
            raise PipelineError(
                f"the checkpoint {folder.name} holds other weights than this experiment trains",
                code="checkpoint-mismatch",
                file=folder,
                mend="resume with the experiment that the run was started with, or start a new run",
            )

    def load_generators(self) -> None:
        """Puts the generators back, and evaluates where the interrupted run had not come to it."""
        if self._pending is None:
            return
        states, self._pending = self._pending, None
        set_generator_states(states["now"])
        if self._owes_evaluation:
            self._owes_evaluation = False
            self._trainer._evaluate(None, None)

    def evaluate(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Evaluates, unless a signal stops it: then the resumed run does, with the generators of now."""
        before = generator_states()
        self._guard.interrupted = agreed(self._guard.interrupted, self._trainer.args.device)
        if not self._guard.interrupted:
            try:
                return evaluate()
            except _EvaluationStopped:
                set_generator_states(before)
                self._trainer._metrics["eval"].clear()
        self._trainer.control.should_save = self._trainer.control.should_training_stop = True
        self._owes_evaluation = True
        return {}

    def watch_loss(self, loss: torch.Tensor, ids: torch.Tensor) -> None:
        """Notes a micro-batch whose loss is not finite, with its rows.

        Args:
            loss: of the micro-batch.
            ids: its token ids, as the collator made them: `[sequences, tokens]`.
        """
        self._step_ids.append(ids)
        if not bool(torch.isfinite(loss)):
            self._guard.note_not_finite("the loss", self._rows_of([ids]))

    def watch_gradient(self, norm: Any) -> None:
        """Notes a step whose gradient is not finite; loss scaling in float16 skips such steps by itself."""
        if norm is not None and not self._trainer.args.fp16 and not math.isfinite(float(norm)):
            self._guard.note_not_finite("the gradient", self._rows_of(self._step_ids))
        self._step_ids = []

    def _rows_of(self, batches: list[torch.Tensor]) -> list[str]:
        """Where the rows of micro-batches are in their files, found by their tokens: whatever drew and packed them."""
        places, dataset = self._trainer.places, self._trainer.train_dataset
        if len(places) != len(dataset):  # a dry run trains on a choice of the rows
            return []
        trained_on = [sequence for ids in batches for sequence in ids.cpu().numpy().astype("<i8")]
        held = b"|".join(sequence.tobytes() for sequence in trained_on)
        found = []
        for row, place in zip(dataset, places, strict=True):
            ids = row["input_ids"] if "input_ids" in row else row["prompt_ids"] + row["chosen_ids"]
            if np.asarray(ids, dtype="<i8").tobytes() in held:
                found.append(place)
        return found

    # What Trainer tells its callbacks.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts back what Trainer starts at zero."""
        if self._resumed is None:
            return
        trainer, counters = self._trainer, self._resumed.counters
        # Of each process its own; where another number of them goes on, which the user has accepted, the first one's.
        sums, process = counters["loss"]["since_log"], args.process_index
        trainer._tr_loss = torch.tensor(sums[process if process < len(sums) else 0], device=args.device)
        trainer._total_loss_scalar = counters["loss"]["before"]
        trainer._globalstep_last_logged = counters["loss"]["logged_at"]
        trainer._initial_global_step = 0
        trainer._total_train_tokens = counters["tokens"]
        trainer.pieces = counters["pieces"]
        trainer._metrics["train"].update(counters["metrics_since_log"])
        with _plain_values():
            states = torch.load(self._resumed.path / _GENERATORS, weights_only=True)
        self._pending = states[process if process < len(states) else 0]
        self._epoch_began = self._pending["epoch"]
        self._owes_evaluation = counters["owes_evaluation"]
        if state.global_step >= state.max_steps:
            self.load_generators()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The order of an epoch may be drawn from the shared generators right after this."""
        if self._pending is not None and state.epoch != int(state.epoch):
            set_generator_states(self._epoch_began)
            return
        self.load_generators()
        self._epoch_began = generator_states()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind the last step of an epoch an evaluation may follow: a checkpoint waits for it."""
        last = state.global_step >= state.max_steps or state.epoch == int(state.epoch)
        if last and control.should_save:
            control.should_save = False
            self._save_is_due = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves what waited; an epoch that was broken off is not at its end."""
        if self._save_is_due:
            control.should_save = True
            self._save_is_due = False
        broken_off = state.global_step < state.max_steps and state.epoch != int(state.epoch)
        if broken_off or self._guard.failure is not None:
            control.should_save = control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal does not wait for the end of an evaluation."""
        if self._guard.interrupted:
            raise _EvaluationStopped

    def _keep(self, step: int, states: list[dict[str, Any]], sums: list[float]) -> None:
        """Puts a checkpoint into its place, or says why it is not there."""
        try:
            with new_checkpoint(self._run.path / "state", step) as folder:
                self._write(folder, states, sums)
            self.saved = step
            if self._trainer.args.save_total_limit is not None:
                rotate(self._run.path / "state", self._trainer.args.save_total_limit)
        except (OSError, SafetensorError, RuntimeError) as error:
            kept = "none was written before" if self.saved is None else f"the last good one is of step {self.saved}"
            cause = " ".join(str(error).split())[:200]
            self._say(f"the checkpoint of step {step} could not be written, {kept}; the run goes on ({cause})")

    def _write(self, folder: Path, states: list[dict[str, Any]], sums: list[float]) -> None:
        """Writes everything.

        Args:
            folder: where to.
            states: of the generators, process by process.
            sums: of each process's losses since the last logged step.
        """
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        torch.save(states, folder / _GENERATORS)
        # Trainer keeps every logged step in its state; metrics.jsonl has them already.
        dataclasses.replace(trainer.state, log_history=[]).save_to_json(str(folder / "trainer_state.json"))
        counters = {
            "metrics": self._recorder.position(),
            "loss": {
                "since_log": sums,
                "before": trainer._total_loss_scalar,
                "logged_at": trainer._globalstep_last_logged,
            },
            "tokens": trainer._total_train_tokens,
            "pieces": trainer.pieces,
            "metrics_since_log": dict(trainer._metrics["train"]),
            "owes_evaluation": self._owes_evaluation,
        }
        write_atomically(folder / COUNTERS, json.dumps(counters))  # a metric of TRL's may be NaN


class Resumable:
    """What a TRL trainer needs to be saved and resumed; stands before the trainer among a class's bases."""

    keeper: Keeper
    places: list[str]
    """`file:line` of each row of the training data."""
    state: TrainerState
    optimizer: Any
    lr_scheduler: Any

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
        """Trainer's, with a look at the loss: a step that is not finite must not be the last good state."""
        rows = inputs["input_ids"]
        loss: torch.Tensor = super().training_step(model, inputs, *rest, **more)  # type: ignore[misc]
        self.keeper.watch_loss(loss, rows)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self.keeper.watch_gradient(norm)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.keeper.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.keeper.load_policy(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, but for the settings in them: what the experiment says of rates and decay holds, if accepted."""
        groups = [] if checkpoint is None else self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        with _plain_values():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        for group, setting in zip(self.optimizer.param_groups if settings else [], settings, strict=True):
            group.update(setting)
        if checkpoint is not None and rates != getattr(self.lr_scheduler, "base_lrs", []):
            self.lr_scheduler.base_lrs = rates
            factors = [multiply(self.lr_scheduler.last_epoch) for multiply in self.lr_scheduler.lr_lambdas]
            for group, rate, factor in zip(self.optimizer.param_groups, rates, factors, strict=True):
                group["lr"] = rate * factor

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.keeper.load_generators()

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        evaluate = super()._evaluate  # type: ignore[misc]
        return self.keeper.evaluate(lambda: evaluate(trial, ignore_keys_for_eval, skip_scheduler))

    def _run_epoch(self, **settings: Any) -> None:
        # Trainer would train one step more when it is resumed behind the last one of a broken epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**settings)  # type: ignore[misc]


@contextmanager
def _plain_values() -> Iterator[None]:
    """What is read inside holds tensors and plain values, and no code.

    Raises:
        PipelineError: it does not, though its hashes hold: somebody has sealed it anew.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise PipelineError(
            f"the checkpoint holds something else than a trainer's state: {' '.join(str(error).split())[:200]}",
            code="foreign-state",
            mend="do not resume from it; start a new run",
        ) from error


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
