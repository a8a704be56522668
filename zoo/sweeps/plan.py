"""The trials of a sweep, every one of them checked before the first is trained."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from zoo.core.errors import UsageError, unknown
from zoo.objectives.base import objectives
from zoo.sweeps.config import SweepConfig
from zoo.sweeps.space import SEED, VARIANT
from zoo.training import machine
from zoo.training.evaluation import held_out, scalars
from zoo.training.fit import Parts
from zoo.training.options import Experiment
from zoo.training.recipes import override, read_experiments

MOST_TRIALS = 100_000


class Trial(NamedTuple):
    """One training of a sweep.

    Attributes:
        number: its place among all.
        stage: "choose" where an option is chosen by it, "final" where that option was chosen, "grid" otherwise.
        point: the swept keys and their values here, without the seed.
        seed: the seed.
        config: every option of the experiment, as a run folder's config.yaml has it.
        words: the words of the recipe, by name.
        group: of a choice, the number of the combination of all other keys; else -1.
    """

    number: int
    stage: str
    point: dict[str, Any]
    seed: int
    config: dict[str, Any]
    words: dict[str, str]
    group: int = -1

    @property
    def id(self) -> str:
        return f"{self.number:05d}"

    @property
    def variant(self) -> str | None:
        return self.point.get(VARIANT)

    @property
    def metric(self) -> str:
        """The validation figure that measures it."""
        train = self.config["train"]
        own = objectives[self.config["objective"]["name"]].metric
        return train["metric"] or (train["target"] or {}).get("metric") or own

    def told(self) -> str:
        """What is special about it, in one line."""
        given = {**self.point, SEED: self.seed}
        return " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items())


class Plan:
    """The trials of a sweep, in order.

    Args:
        config: the sweep.

    Raises:
        UsageError: a trial that could not be built or trained, or two that are the same.
    """

    def __init__(self, config: SweepConfig):
        self.config = config
        self.space = config.read_space()
        self._parts: dict[str, Parts] = {}
        self._metrics: dict[str, list[str]] = {}
        self.keys = [k for k in (*self.space.axes, *self.space.drawn) if k != SEED]
        self.trials: list[Trial] = []
        """Those that are known from the start."""
        self.finals = 0
        """How many more trials follow the choice."""
        self.trials = list(self._first())
        if config.choose is not None:
            groups = {trial.group for trial in self.trials}
            self.finals = len(groups) * len(self._seeds())

    def __len__(self) -> int:
        return len(self.trials) + self.finals

    def _first(self) -> Iterator[Trial]:
        points, choose = list(self._points()), self.config.choose
        seeds = self._seeds() if choose is None else list(choose.seeds)
        if len(points) * len(seeds) > MOST_TRIALS:
            raise UsageError(f"This sweep has {len(points) * len(seeds):,} trials; at most {MOST_TRIALS:,} are run.")
        groups: dict[str, int] = {}
        told: dict[str, Trial] = {}
        for index, (point, seed) in enumerate(itertools.product(points, seeds)):
            group = -1
            if choose is not None:
                others = {k: v for k, v in point.items() if k != choose.key}
                group = groups.setdefault(json.dumps(others), len(groups))
            trial = self.trial(index, "grid" if choose is None else "choose", point, seed, group)
            other = told.setdefault(json.dumps({**trial.config, "name": ""}), trial)
            if other is not trial:
                raise UsageError(f"Two trials are the same experiment: {other.told()} and {trial.told()}.")
            yield trial

    def _points(self) -> Iterator[dict[str, Any]]:
        axes = {k: v for k, v in self.space.axes.items() if k != SEED}
        for values in itertools.product(*axes.values()):
            for draw in range(self.config.search.n or 1 if self.space.drawn else 1):
                drawn = {k: d.draw(k, self.config.search.seed, draw) for k, d in self.space.drawn.items()}
                yield {**dict(zip(axes, values, strict=True)), **drawn}

    def _seeds(self) -> list[int]:
        return self.space.axes.get(SEED) or [self._base_seed()]

    def _base_seed(self) -> int:
        train = self.config.experiment.get("train")
        seed = train.get("seed", 0) if isinstance(train, Mapping) else 0
        return seed if isinstance(seed, int) else 0

    def group(self, index: int) -> list[Trial]:
        """The trials among which a combination's option is chosen."""
        return [trial for trial in self.trials if trial.group == index]

    def final(self, index: int, value: Any) -> list[Trial]:
        """The trials of a combination, once the value of its option is chosen."""
        assert self.config.choose is not None
        seeds, point = self._seeds(), self.group(index)[0].point
        start = len(self.trials) + index * len(seeds)
        point = {**point, self.config.choose.key: value}
        return [self.trial(start + i, "final", point, seed, index) for i, seed in enumerate(seeds)]

    def trial(self, index: int, stage: str, point: dict[str, Any], seed: int, group: int) -> Trial:
        """One trial, checked.

        Raises:
            UsageError: it cannot be built or trained; says which it is.
        """
        trial = Trial(index, stage, point, seed, {}, {}, group)
        try:
            return self._trial(trial)
        except UsageError as error:
            swept = f" (in the trial {trial.told()[:300]})" if self.keys or SEED in self.space.axes else ""
            raise UsageError(f"{str(error).rstrip('.')}{swept}.") from None

    def _trial(self, trial: Trial) -> Trial:
        base = self.config.experiment
        changes = {**self.space.fixed, **{k: v for k, v in trial.point.items() if k != VARIANT}, SEED: trial.seed}
        variants = [trial.variant] if trial.variant is not None else []
        experiment = next(iter(read_experiments(base, changes, variants).values()))
        experiment = self._with_threads(experiment, changes)
        parts = self._fitted(experiment)
        words = self._words(changes, trial.variant)
        config = experiment.resolved(parts) | {"name": trial.id}
        return trial._replace(config=config, words=words)

    def _with_threads(self, experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
        """One thread for each trial where nothing is said: several trials run at once."""
        if experiment.train.threads is not None or "threads" in experiment.train.model_fields_set:
            return experiment
        return experiment.model_copy(update={"train": experiment.train.model_copy(update={"threads": 1})})

    def _words(self, changes: Mapping[str, Any], variant: str | None) -> dict[str, str]:
        data = {k: v for k, v in self.config.experiment.items() if k in ("words", "variants")}
        table = data.pop("variants", None) or {}
        mixed = override(override(data, table.get(variant) or {}), changes) if variant else override(data, changes)
        return {str(k): str(v) for k, v in (mixed.get("words") or {}).items()}

    def _fitted(self, experiment: Experiment) -> Parts:
        """The parts of an experiment; those of many that differ in their training only are made once."""
        train = experiment.train
        fields = {"task", "objective", "model", "init"}
        asked = [experiment.model_dump(mode="json", include=fields), train.puzzle_lr is None]
        key = json.dumps(asked, default=str)
        if key in self._parts:
            experiment.check(self._parts[key])
        else:
            self._parts[key] = experiment.build()
        parts = self._parts[key]
        machine.choose_device(train.device)
        task = json.dumps(experiment.task, default=str)
        if task not in self._metrics:
            rows = held_out(parts.task, "validation", 2)
            self._metrics[task] = ["loss", *scalars(parts.task.score(rows, rows.targets))]
        for metric in {train.selects_by(parts.objective.metric), *([train.target.metric] if train.target else [])}:
            if metric not in self._metrics[task]:
                raise unknown("metric", metric, self._metrics[task])
        return parts


__all__ = ["Plan", "Trial"]
