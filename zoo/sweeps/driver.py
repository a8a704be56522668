"""The course of a sweep: what is started when, what is stored, and what is said at the end."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from typing import Any

import zoo
from zoo.core.errors import UsageError, quoted
from zoo.sweeps.folder import SweepFolder
from zoo.sweeps.plan import Plan, Trial
from zoo.sweeps.store import Record
from zoo.sweeps.trial import DONE, Job, Outcome, base_row
from zoo.sweeps.view import View
from zoo.sweeps.workers import Workers
from zoo.tasks.scores import LOWER_IS_BETTER
from zoo.training.stopping import Interrupted, Stop


class Driver:
    """Runs the trials of a plan that the store does not have yet.

    Args:
        plan: the trials.
        folder: the sweep's, locked.
        view: shows what happens.
        stop: asks for an end.
    """

    def __init__(self, plan: Plan, folder: SweepFolder, view: View, stop: Stop):
        self.plan, self.folder, self.view, self.stop = plan, folder, view, stop
        self.store, self.config = folder.store, plan.config
        self.rows: dict[int, dict[str, Any]] = {}
        """What is stored of each trial."""
        if self.store.folder.is_dir():
            self.rows = {row["trial"]: row for row in self.store.trials().rows(named=True)}
        self.queue: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.chosen: set[int] = set()
        self.seconds = sum(row["seconds"] or 0.0 for row in self.rows.values())
        self.started = 0
        self._begun = time.monotonic()

    def prepare(self) -> int:
        """Find out what there is to do; returns the number of trials, of a later stage too."""
        for trial in self.plan.trials:
            self._enqueue(trial)
        self._choose()
        return len(self.queue) + (self.plan.finals if self.queue else 0)

    def run(self, workers: Workers) -> None:
        """Train what `prepare` has found, until nothing is left, the budget is spent, or a signal ends it.

        Raises:
            Interrupted: SIGINT or SIGTERM, after the trials that ran have saved a checkpoint.
        """
        interrupted: int | None = None
        while self.queue or self.running:
            if self.stop() and interrupted is None:
                interrupted = 128 + int(self.stop.number or 2)
            if interrupted is not None:
                if not self.running:
                    break
                workers.stop()
            while interrupted is None and self.queue and len(self.running) < workers.count and self._has_budget():
                self._start(workers, self.queue.popleft())
            if not self.running:
                break
            for outcome in workers.wait():
                self._take(outcome)
                if outcome.exit_status is not None and interrupted is None:
                    interrupted = outcome.exit_status
            self.view.show(self.rows, self.running, workers.records(), len(self.plan))
        if interrupted is not None:
            told = f"Interrupted with {self.told()}. The same command continues: zoo sweep {self.folder.path}"
            raise Interrupted(told, interrupted - 128)

    def _enqueue(self, trial: Trial) -> None:
        row = self.rows.get(trial.number)
        attempt = 1
        if row is not None:
            _check_same(trial, row)
            if row["status"] in DONE or (row["status"] == "failed" and row["attempts"] > self.config.retries):
                return
            attempt = (row["attempts"] or 1) + (row["status"] == "failed")
        self.queue.append(Job(trial, str(self.folder.trial(trial.id).absolute()), attempt))

    def _has_budget(self) -> bool:
        budget = self.config.budget
        begun = sum(row["status"] != "running" for row in self.rows.values()) + len(self.running)
        if budget.trials is not None and begun >= budget.trials and self.queue[0].trial.number not in self.rows:
            return False
        if budget.slice is not None and time.monotonic() - self._begun >= budget.slice:
            return False
        return budget.seconds is None or self.seconds < budget.seconds

    def _start(self, workers: Workers, job: Job) -> None:
        self.running[job.trial.number] = job
        self.started += 1
        self._store(Record(base_row(job, "running")))
        self.view.show(self.rows, self.running, workers.records(), len(self.plan))
        workers.start(job)

    def _store(self, record: Record) -> None:
        self.store.add(record)
        self.rows[record.row["trial"]] = dict(record.row)

    def _take(self, outcome: Outcome) -> None:
        job = outcome.job
        del self.running[job.trial.number]
        self._store(outcome.record)
        self.seconds += outcome.record.row.get("seconds") or 0.0
        if outcome.status == "failed" and job.attempt <= self.config.retries:
            self.view.say(f"{job.trial.id} failed and is started again: {outcome.record.row['reason']}")
            self.queue.append(job._replace(attempt=job.attempt + 1))
            return
        self.view.ended(job.trial, outcome.record.row)
        self._choose()

    # ---- the choice of an option

    def _choose(self) -> None:
        """Enqueue the final trials of every combination whose option can be chosen now, before all other trials: the
        store of a sweep that stops early then holds whole combinations."""
        if self.config.choose is None:
            return
        waiting, self.queue = self.queue, deque()
        for group in sorted({trial.group for trial in self.plan.trials} - self.chosen):
            trials = self.plan.group(group)
            if all(self._is_over(trial) for trial in trials):
                self.chosen.add(group)
                value = self._best(trials)
                if value is None:
                    self._give_up(group, trials[0])
                    continue
                for trial in self.plan.final(group, value):
                    self._enqueue(trial)
        self.queue += waiting

    def _is_over(self, trial: Trial) -> bool:
        row = self.rows.get(trial.number)
        if row is None or trial.number in self.running:
            return False
        return row["status"] in DONE or (row["status"] == "failed" and row["attempts"] > self.config.retries)

    def _best(self, trials: list[Trial]) -> Any:
        """The value with the best mean validation figure over its seeds; a value that failed at one seed is out."""
        assert self.config.choose is not None
        figures: dict[Any, list[float]] = {}
        values = []
        for trial in trials:
            value = trial.point[self.config.choose.key]
            if value not in values:
                values.append(value)
            figures.setdefault(values.index(value), []).append(figure_of(self.rows[trial.number], trial))
        means = {i: math.fsum(found) / len(found) for i, found in figures.items()}
        best = max(means, key=lambda i: means[i])
        return None if means[best] == -math.inf else values[best]

    def _give_up(self, group: int, example: Trial) -> None:
        """Record that no option could be chosen: the final trials of this combination cannot be trained."""
        assert self.config.choose is not None
        key = self.config.choose.key
        for trial in self.plan.final(group, example.point[key]):
            point = {**trial.point, key: None}
            reason = f"no {key} could be chosen: all of its trials failed"
            self._store(Record(base_row(Job(trial._replace(point=point), "", 1), "failed", reason)))

    # ---- the end

    def told(self) -> str:
        """How many trials ended in which way."""
        counts: dict[str, int] = {}
        for row in self.rows.values():
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        counts["not started"] = len(self.plan) - len(self.rows)
        parts = [f"{n} {status}" for status, n in counts.items() if n]
        return f"{len(self.plan)} trials: {', '.join(parts) or 'none'}"


def _check_same(trial: Trial, row: dict[str, Any]) -> None:
    """Refuse to continue a trial that is another one in the store.

    Raises:
        UsageError: an option differs, as after sweep.yaml was edited by hand.
    """
    if row["zoo_version"] != zoo.__version__:  # which may have options that this one has not
        return
    now = base_row(Job(trial, ""), "running")
    for column in (c for c in now if c.startswith("config.") and c != "config.out" and c in row):
        before, after = row[column], now[column]
        if before != after and _text(before) != _text(after):
            key, told = column.removeprefix("config."), f"{quoted(before, 40)} in the store, {quoted(after, 40)} now"
            fix = "put the old value into sweep.yaml, or choose another folder with --out"
            raise UsageError(f"The trial {trial.id} has another {key} ({told}): {fix}.")


def _text(value: Any) -> str:
    """A value as a column has it whose values are of several kinds."""
    return value if isinstance(value, str) else json.dumps(value)


def figure_of(row: dict[str, Any], trial: Trial) -> float:
    """The validation figure of a trial, the larger the better; below all where it has none."""
    metric = trial.metric
    value = row.get(f"validation.{metric}")
    if row["status"] == "failed" or not isinstance(value, int | float) or math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


__all__ = ["Driver", "figure_of"]
