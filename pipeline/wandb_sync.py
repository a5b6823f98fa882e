"""`pipeline wandb-sync RUN`: sends to W&B what a run could not send itself, from its own record."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.errors import ExitCode, PipelineError
from pipeline.experiment import Experiment
from pipeline.runs.lock import locked
from pipeline.runs.run import Run
from pipeline.tracking import start_tracker


def sync(run: Run, experiment: Experiment, say: Callable[[str], None]) -> dict[str, Any]:
    """Sends every line of `metrics.jsonl` as a new W&B run in the group of the experiment.

    Under the old id W&B would drop the steps that it has, or take a rewound run for another: a new one is whole.

    Args:
        run: any that is not being trained; its manifest notes the new id.
        experiment: as the run resolved it.
        say: tells the user one line.

    Returns:
        What the manifest says of the W&B run: `id`, `mode`, `project`, `group`.

    Raises:
        PipelineError: the run logged nothing, is being trained, or W&B takes nothing.
    """
    try:
        lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        lines = []
    except ValueError as error:
        raise PipelineError(
            f"the record cannot be read: {error}",
            code="damaged-run",
            file=run.metrics_file,
            mend="resume the run, which cuts a torn line",
        ) from error
    if not lines:
        raise PipelineError(
            f"{run.name} has logged nothing", code="nothing-to-send", file=run.path, mend="name another run"
        )
    with locked(run.path):
        tracker = start_tracker(
            experiment.tracking.wandb.model_copy(update={"mode": "online"}),
            experiment=experiment.name,
            name=run.path.name,
            stage=run.stage,
            folder=run.path,
            config={"experiment": experiment.model_dump(mode="json"), "manifest": run.manifest},
            say=say,
        )
        described = tracker.describe()
        for line in lines:
            tracker.log(line.pop("step"), line)
        tracker.finish(run.manifest)
        if tracker.gave_up or described is None or described["mode"] != "online":
            raise PipelineError(
                "W&B did not take it",
                code="not-sent",
                mend="check the key (`wandb login`) and the connection, and try again",
                exit_code=ExitCode.MACHINE,
            )
        earlier = [*run.manifest.get("wandb_earlier", []), run.manifest.get("wandb")]
        run.update(wandb=described, wandb_earlier=[one for one in earlier if one])
    say(f"sent: {len(lines):,} lines as {described['project']}/{described['id']}, group {described['group']}")
    return described
