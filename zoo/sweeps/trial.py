"""One trial of a sweep: an ordinary training into a folder of its own, and what is stored of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

import zoo
from zoo.core.errors import Diverged, RunError, UsageError
from zoo.core.run_files import dotted, read_metrics, read_result
from zoo.sweeps.plan import Trial
from zoo.sweeps.store import Record
from zoo.training import machine
from zoo.training.evaluation import answered, held_out, row_figures
from zoo.training.loading import open_run
from zoo.training.options import Experiment
from zoo.training.result import ENDED
from zoo.training.stopping import Interrupted
from zoo.training.train import train
from zoo.training.watch import Watch

DONE = (*ENDED, "pruned")
"""How a trial ends that is not started again."""


class Job(NamedTuple):
    """A trial and the folder it is trained into, as it is sent to a worker."""

    trial: Trial
    folder: str
    attempt: int = 1


class Outcome(NamedTuple):
    """What came of a job.

    Attributes:
        job: the job.
        status: one of `DONE`, "failed" or "interrupted".
        record: what is stored.
        exit_status: of an interruption, that of the process.
    """

    job: Job
    status: str
    record: Record
    exit_status: int | None = None


class TrialWatch(Watch):
    """Follows one trial.

    Args:
        job: the trial.
        judge: takes the trial's index and a validation record; whether the trial ends here.
        stops: whether the trial should save a checkpoint and end.
    """

    keeps_rows = True

    def __init__(self, job: Job, judge: Callable[[int, dict[str, Any]], bool], stops: Callable[[], bool]):
        self.job, self.judge, self.stops = job, judge, stops  # type: ignore[method-assign]
        self.reads_test = job.trial.stage != "choose"

    def evaluated(self, record: Mapping[str, Any]) -> bool:
        return self.judge(self.job.trial.number, dict(record))


def run_trial(
    job: Job, judge: Callable[[int, dict[str, Any]], bool], stops: Callable[[], bool] = lambda: False
) -> Outcome:
    """Train a trial, or continue one that was interrupted; whatever goes wrong is part of the outcome.

    Args:
        job: the trial.
        judge: see `TrialWatch`.
        stops: see `TrialWatch`.
    """
    started, seconds, used = datetime.now(UTC), time.perf_counter(), time.process_time()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    watch, folder = TrialWatch(job, judge, stops), Path(job.folder)
    status, reason, exit_status = "failed", None, None
    device = torch.device("cpu")
    measured = diverged = False
    threads = torch.get_num_threads()
    try:
        experiment = Experiment(**{**job.trial.config, "out": job.folder})
        device = machine.choose_device(experiment.train.device)
        measured = machine.reset_peak_memory(device)
        status = train(experiment, quiet=True, watch=watch).status
        if watch.reads_test and watch.rows is None and status in ENDED:
            watch.rows = read_rows(folder)
    except Interrupted as error:
        status, reason, exit_status = "interrupted", "interrupted", error.exit_status
    except (UsageError, RunError) as error:
        reason, diverged = " ".join(str(error).split()), isinstance(error, Diverged)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    finally:
        torch.set_num_threads(threads)
    row = base_row(job, status, reason, started, time.perf_counter() - seconds)
    result, curves = _figures(folder)
    row |= result | {"diverged": diverged, "processor_seconds": time.process_time() - used, "load": load}
    if not measured:
        row["peak_memory"] = None
    problems = None if watch.rows is None else {"row": list(range(len(watch.rows["problem"]))), **watch.rows}
    return Outcome(job, status, Record(row, curves, problems), exit_status)


def read_rows(folder: Path) -> dict[str, list[Any]]:
    """The figures of every test row of a run that has ended: the process that trained the run died before it could say
    them."""
    model, parts, config, precision, _ = open_run(folder, None, "best")
    rows = held_out(parts.task, "test", config.test_rows)
    size = config.eval_batch_size or config.batch_size
    answers = answered(model, parts.objective, rows, batch_size=size, precision=precision)
    return row_figures(parts.task, rows, answers.predictions)


def base_row(
    job: Job, status: str, reason: str | None = None, started: datetime | None = None, took: float | None = None
) -> dict[str, Any]:
    """What is stored of a trial whatever came of it."""
    trial, now = job.trial, datetime.now(UTC)
    row: dict[str, Any] = {
        "trial": trial.number,
        "id": trial.id,
        "stage": trial.stage,
        "status": status,
        "reason": reason,
        "attempts": job.attempt,
        "seed": trial.seed,
        "started": (started or now).isoformat(timespec="seconds"),
        "ended": None if took is None else now.isoformat(timespec="seconds"),
        "zoo_version": zoo.__version__,
    }
    row |= {f"set.{key}": value if _is_scalar(value) else json.dumps(value) for key, value in trial.point.items()}
    row["set.train.seed"] = trial.seed
    row |= _columns({k: v for k, v in trial.config.items() if k != "name"}, "config.")
    row |= {f"config.words.{name}": word for name, word in trial.words.items()}
    if trial.variant is not None:
        row["config.variant"] = trial.variant
    return row


def _figures(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run folder says: columns of `trials`, and the rows of `curves`."""
    try:
        result, lines = read_result(folder), read_metrics(folder)
    except UsageError:  # the run has not got so far
        return {}, []
    names = {"parameters": "n_parameters", "peak_memory": "peak_memory_bytes"}
    names |= {k: k for k in ("steps", "seconds", "state_bytes", "flops_per_token", "tokens_per_second", "commit")}
    row = {column: result.get(name) for column, name in names.items()}
    for split in ("validation", "test"):
        score = result.get(split) or {}
        row |= _columns({k: v for k, v in score.items() if k != "slices"}, f"{split}.")
    row |= _columns(result.get("machine") or {}, "machine.")
    curves = [{k: v for k, v in line.items() if _is_scalar(v)} for line in lines if line.get("split") != "test"]
    return row, curves


def _columns(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A nested mapping as columns; what is no scalar becomes JSON text."""
    return {key: value if _is_scalar(value) else json.dumps(value) for key, value in dotted(data, prefix)}


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


__all__ = ["DONE", "Job", "Outcome", "TrialWatch", "base_row", "read_rows", "run_trial"]
