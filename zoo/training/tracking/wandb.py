"""Runs on Weights & Biases."""

from __future__ import annotations

from typing import Any

from zoo.training.result import ENDED
from zoo.training.tracking.base import Tracker, figures, outcome


class WandB(Tracker):
    """Sends the records of a run to Weights & Biases, with its config and result.

    W&B's own environment variables apply: `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE=offline`, `WANDB_DIR`. A resumed
    run continues the same W&B run. If a run is active (`wandb.init` was called), that one is used and left open.
    Figures are plotted over `step`; nothing but records, config and result is sent.

    Args:
        **options: arguments of `wandb.init`, such as `project="mine"`, `tags=["sweep"]`, `mode="offline"`.

    Raises:
        UsageError: the package wandb is not installed.
    """

    package, entry = "wandb", "init"

    def __init__(self, **options: Any):
        super().__init__()
        self._options = options

    def on_start(self, run: dict[str, Any]) -> None:
        self._is_own = self.library.run is None
        if self._is_own:
            known = {"id": self.known_as(run["folder"]), "resume": "allow"}
            self._run = self.library.init(**{"name": run["name"], **known, **self._options})
            self.remember(run["folder"], self._run.id)
        else:
            self._run = self.library.run
        self._run.config.update(run["config"], allow_val_change=True)  # a run may have been given more steps
        # W&B refuses steps that go back, as those of a run do that was killed and is resumed; a figure of its own may.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_log(self, record: dict[str, Any]) -> None:
        self._run.log({"step": record["step"], **figures(record)})

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.on_log(record)

    def on_end(self, result: dict[str, Any]) -> None:
        self._run.summary.update(outcome(result))
        if self._is_own:
            self._run.finish(exit_code=0 if result["status"] in ENDED else 1)


__all__ = ["WandB"]
