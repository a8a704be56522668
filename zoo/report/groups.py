"""Runs that differ in nothing but their seed, and what their figures are over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from zoo.report import units
from zoo.report.labels import config_key, differing, in_words
from zoo.report.runs import Run
from zoo.statistics import Interval, t_interval

_NAMED = 3  # the most names, or settings, that are written out


@dataclass(frozen=True)
class Group:
    """Runs of one config.

    Attributes:
        label: its name, with the settings that tell it from other groups of this name.
        runs: in the order of their seeds.
    """

    label: str
    runs: list[Run]

    @property
    def seeds(self) -> list[str]:
        """The distinct seeds."""
        return list(dict.fromkeys(str(run.seed) for run in self.runs))

    def over_seeds(self, key: str) -> Spread | None:
        """A figure over the seeds of the runs that have ended; None where there are fewer than two values.

        Figures of test are not mixed with those of validation: where some have one, only these count.
        """
        ended = [run for run in self.runs if run.has_ended and run.figure(key) is not None]
        splits = {run.scores()[1] for run in ended}
        ended = [run for run in ended if run.scores()[1] == ("test" if "test" in splits else "validation")]
        by_seed: dict[str, list[float]] = {}
        for run in ended:
            by_seed.setdefault(str(run.seed), []).append(run.figure(key) or 0.0)
        values = [fmean(of_seed) for of_seed in by_seed.values()]
        interval = t_interval(values)
        return None if interval is None else Spread(key, values, interval)


@dataclass(frozen=True)
class Spread:
    """A figure of several seeds: a value each, and Student's t interval (95%) of their mean."""

    key: str
    values: list[float]
    interval: Interval

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def text(self) -> str:
        """Range, number of seeds, mean, interval and the values, as the page and the terminal say them."""
        text = units.plain if self.key == "mse" else units.percent
        if min(self.values) == max(self.values):  # of which Student's t says nothing
            return f"{self.key} {text(self.mean)} in each of {len(self.values)} seeds"
        most = math.inf if self.key == "mse" else 1.0  # a share ends at 0 and at 1
        low, high = (text(min(most, max(0.0, edge))) for edge in self.interval)
        each = ", ".join(map(text, self.values))
        return (
            f"{self.key} {text(min(self.values))} to {text(max(self.values))} over "
            f"{len(self.values)} seeds, mean {text(self.mean)} (95% interval of Student's t {low} to {high}; "
            f"each {each})"
        )


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by everything of their config but name, folder, seed and what only keeps books, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(config_key(run), []).append(run)
    every = [sorted(group, key=_by_seed) for group in found.values()]
    return [Group(_label(group, every), group) for group in every]


def _by_seed(run: Run) -> tuple[float, str]:
    seed = units.number(run.seed)
    return (math.inf if seed is None else seed), str(run.seed)


def _label(group: Sequence[Run], every: Sequence[Sequence[Run]]) -> str:
    """The names of a group, with the settings that tell it from the groups in which one of them is found too."""
    names = list(dict.fromkeys(run.name for run in group))
    told = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    alike = [other[0] for other in every if {run.name for run in other} & set(names)]
    own = in_words(group[0], differing(alike)) if len(alike) > 1 else ""
    return f"{told} ({own})" if own else told
