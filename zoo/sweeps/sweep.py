"""`zoo.sweep`: many trainings as one study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from zoo.core.errors import UsageError
from zoo.sweeps import cluster
from zoo.sweeps.asha import history_of, judged
from zoo.sweeps.config import SweepConfig, read_sweep_config
from zoo.sweeps.driver import Driver
from zoo.sweeps.folder import SweepFolder
from zoo.sweeps.judge import Judge, has_ray
from zoo.sweeps.plan import Plan
from zoo.sweeps.store import Store
from zoo.sweeps.view import View
from zoo.sweeps.workers import Here, Workers
from zoo.training.randomness import kept_random_state
from zoo.training.stopping import stop_on_signals


class Sweep(NamedTuple):
    """What a sweep leaves.

    Attributes:
        path: its folder.
        counts: number of trials by how they ended; "not started" where the budget was spent.
    """

    path: Path
    counts: dict[str, int]

    @property
    def failed(self) -> int:
        """Number of trials that failed."""
        return self.counts.get("failed", 0)

    def trials(self) -> pl.DataFrame:
        """A row for each trial: its whole config, how it ended, its figures, its machine."""
        return Store(self.path).trials()

    def curves(self) -> pl.DataFrame:
        """A row for each training report and each evaluation of a trial."""
        return Store(self.path).curves()

    def problems(self) -> pl.DataFrame:
        """A row for each test row of a trial."""
        return Store(self.path).problems()


def sweep(
    experiment: Any,
    space: Mapping[str, Any] | None = None,
    *,
    variants: Iterable[str] = (),
    out: str | Path | None = None,
    search: str | Mapping[str, Any] | None = None,
    seeds: Iterable[int] | None = None,
    choose: Mapping[str, Any] | None = None,
    budget: Mapping[str, float] | None = None,
    retries: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    ray: bool | None = None,
    quiet: bool = False,
) -> Sweep:
    """Train an experiment at many points of a space, and store every trial's config, curves and scores.

    If the folder contains this sweep, it continues: trials that ended are kept, one that was interrupted is resumed.

    Args:
        experiment: a sweep (its name, YAML file, folder, or a mapping with the key `experiment`), or an experiment (a
            recipe's name, a YAML file, a mapping or an `Experiment`).
        space: dotted keys, each with a list of values (for an option that takes a list, a list of lists), a
            distribution such as `{"log_uniform": [1e-4, 1e-2]}`, or one value for all trials.
        variants: the variants of a recipe, by default all.
        out: the folder, by default `runs/<name>`.
        search: "grid", "random(20)" or "asha(n=20)"; see `zoo.sweeps.search.Search`.
        seeds: the seeds of every combination.
        choose: `{"key": "train.lr", "seeds": [100, 101]}`: an option that is chosen by validation, at seeds of its own.
        budget: `{"seconds": 600, "trials": 50, "slice": 300}`: when no further trial is started.
        retries: how often a trial that failed is started again.
        workers: number of trials at once with Ray, by default one for each processor.
        address: of a Ray cluster.
        ray: whether Ray trains the trials, by default where it is installed and `workers` is not 1; without it they are
            trained in this process, one after another, to the same bits.
        quiet: print nothing.

    Raises:
        UsageError: any wrong input, in any trial, before the first is trained; a folder in use, or of another sweep.
        Interrupted: SIGINT or SIGTERM, after the trials that ran have saved a checkpoint.
    """
    options: dict[str, Any] = {
        "search": search,
        "choose": choose,
        "budget": budget,
        "retries": retries,
        "workers": workers,
    }
    options |= {"seeds": None if seeds is None else list(seeds), "out": None if out is None else str(out)}
    config = read_sweep_config(experiment, space, list(variants), **options)
    return run_sweep(config, address=address, ray=ray, quiet=quiet)


def dry_run(config: SweepConfig) -> list[str]:
    """The trials of a sweep, a line for each.

    Raises:
        UsageError: as `sweep`.
    """
    plan = Plan(config)
    judged(plan)
    lines = [f"{trial.id}  {trial.told()}" for trial in plan.trials]
    lines += [f"{config.folder}: {len(plan)} trials"]
    if config.choose is not None:
        told = f"{len(plan.trials)} to choose {config.choose.key} by {plan.trials[0].metric} on validation"
        lines[-1] += f", of which {told}, then {plan.finals} with the chosen values"
    return lines


def summary(done: Sweep) -> list[str]:
    """What a person reads at the end of a sweep."""
    rows = done.trials().rows(named=True)
    total = sum(done.counts.values())
    told = ", ".join(f"{n} {status}" for status, n in done.counts.items())
    lines = [f"{done.path}: {total} {'trial' if total == 1 else 'trials'}: {told}"]
    if done.failed:
        row = next(row for row in rows if row["status"] == "failed")
        what = "One trial" if done.failed == 1 else f"{done.failed} trials"
        lines.append(f"{what} failed, such as {row['id']}: {row['reason']}")
    if done.counts.get("not started"):
        lines.append(f"The same command continues, or: zoo sweep {done.path}")
    return [*lines, f"Compare them with: zoo compare {done.path}"]


@kept_random_state()
def run_sweep(config: SweepConfig, *, address: str | None, ray: bool | None, quiet: bool) -> Sweep:
    """Run what `sweep` describes."""
    if ray is None:
        ray = address is not None or (has_ray() and config.workers != 1)
    if ray and not has_ray():
        raise UsageError("Ray is not installed: pip install sequence-zoo[sweep], or leave out --address.")
    if not ray and address is not None:
        raise UsageError("--address is that of a Ray cluster: leave out --no-ray.")
    plan = Plan(config)
    rules, groups = judged(plan)
    metric = plan.trials[0].metric
    with SweepFolder(config.folder) as folder, stop_on_signals() as stop:
        folder.open(config, len(plan))
        with View(str(folder.path), metric, quiet=quiet) as view:
            driver = Driver(plan, folder, view, stop)
            history = [] if rules is None else history_of(plan, folder.store, folder.trial(""))
            wanted = driver.prepare()
            workers: Workers
            if ray and wanted:
                workers = cluster.RayWorkers(config.workers, address, rules, groups, history, wanted)
            else:
                workers = Here(Judge(rules, groups, history).evaluated)
            try:
                driver.run(workers)
            finally:
                workers.close()
                folder.store.compact()
        counts: dict[str, int] = {}
        for row in driver.rows.values():
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        if missing := len(plan) - len(driver.rows):
            counts["not started"] = missing
    return Sweep(folder.path, counts)


__all__ = ["Sweep", "dry_run", "run_sweep", "summary", "sweep"]
