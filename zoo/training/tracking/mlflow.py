"""Runs on MLflow."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from zoo.core.run_files import dotted
from zoo.training.result import ENDED
from zoo.training.tracking.base import Tracker, figures, outcome

_MOST_AT_ONCE = 100  # parameters or tags of one request
_MOST_CHARACTERS = 6000  # of a parameter
_DEFAULT = "0"  # the id of MLflow's default experiment
_STATUS = {"interrupted": "KILLED", **dict.fromkeys(ENDED, "FINISHED")}


class MLflow(Tracker):
    """Sends the records of a run to MLflow, with its config as parameters and its result as metrics and tags.

    MLflow's own environment variables apply: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`. A resumed run continues
    the same MLflow run. An active run of the same process is left alone.

    Args:
        experiment: name of the experiment, which is created where there is none; by default `MLFLOW_EXPERIMENT_NAME`,
            else MLflow's default experiment.
        tracking_uri: where runs are stored; by default MLflow's choice.
        tags: further tags of the run.

    Raises:
        UsageError: the package mlflow is not installed.
    """

    package, entry = "mlflow", "MlflowClient"

    def __init__(
        self, experiment: str | None = None, *, tracking_uri: str | None = None, tags: Mapping[str, str] | None = None
    ):
        super().__init__()
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        self._uri, self._tags = tracking_uri, dict(tags or {})

    def on_start(self, run: dict[str, Any]) -> None:
        self._client = self.library.MlflowClient(self._uri)
        known = self.known_as(run["folder"])
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        tags = {"mlflow.source.name": "sequence-zoo", "zoo.folder": run["folder"], **self._tags}
        created = self._client.create_run(self._experiment_id(), run_name=run["name"], tags=tags)
        self._id = created.info.run_id
        self.remember(run["folder"], self._id)
        options = dotted(run["config"])
        params = [self.library.entities.Param(key, _text(value)[:_MOST_CHARACTERS]) for key, value in options]
        for i in range(0, len(params), _MOST_AT_ONCE):
            self._client.log_batch(self._id, params=params[i : i + _MOST_AT_ONCE])

    def _experiment_id(self) -> str:
        if self._experiment is None:
            return _DEFAULT
        found = self._client.get_experiment_by_name(self._experiment)
        return self._client.create_experiment(self._experiment) if found is None else found.experiment_id

    def on_log(self, record: dict[str, Any]) -> None:
        self._log(figures(record), record["step"])

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.on_log(record)

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.library.entities.Metric(key, value, now, step) for key, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def on_end(self, result: dict[str, Any]) -> None:
        facts = outcome(result)
        numbers = {k: v for k, v in facts.items() if isinstance(v, int | float) and not k.startswith("test/")}
        self._log(numbers, result.get("steps", 0))
        self._client.set_tag(self._id, "zoo.status", str(result["status"]))
        self._client.set_terminated(self._id, _STATUS.get(result["status"], "FAILED"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


__all__ = ["MLflow"]
