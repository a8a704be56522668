"""The best value of an option, such as a learning rate, chosen by validation figures of other seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from zoo.core.errors import UsageError
from zoo.report.runs import ENDED
from zoo.report.trials.figures import figure, lower_is_better
from zoo.report.trials.source import CHOOSE, value
from zoo.report.units import printable

How = Literal["seeds of its own", "the other seeds", "the same seed"]


@dataclass(frozen=True)
class Choice:
    """The value of each seed.

    Attributes:
        values: text of the chosen value, by seed.
        n: from how many values.
        how: on which seeds' validation figures it was chosen.
        lost: seeds whose trial with the chosen value has no result.
    """

    values: Mapping[Hashable, str]
    n: int
    how: How
    lost: tuple[Hashable, ...] = ()

    @property
    def text(self) -> str:
        """The values chosen, each with the seeds that chose it where these differ."""
        counted = Counter(self.values.values())
        if len(counted) == 1:
            return next(iter(counted))
        return ", ".join(f"{given} ({n})" for given, n in counted.most_common())


def tried(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The value of a trial, as text."""
    given = [value(row, key) for key in keys]
    return ", ".join(f"{v:g}" if isinstance(v, float) else printable(v) for v in given)


def choose(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str
) -> tuple[list[Mapping[str, Any]], Choice]:
    """The trials with the best value of `keys`, one or more a seed, and what was chosen.

    Trials of the stage "choose" decide where there are any, on seeds of their own. Otherwise the value of each seed has
    the best mean validation figure over the other seeds, so that no seed chooses its own; a single seed has no other.
    Only trials that ended count: one that was stopped early has no figure of its last step.

    Args:
        rows: the trials of one configuration, all values and stages.
        keys: what was tried.
        metric: the validation figure that decides.

    Raises:
        UsageError: a seed has results at several values though one was chosen, as of sweeps that chose differently.
    """
    if any(row["stage"] == CHOOSE for row in rows):
        final = [row for row in rows if row["stage"] != CHOOSE]
        _check_one_value(final, keys)
        n = len({tried(row, keys) for row in rows if row["stage"] == CHOOSE})
        return final, Choice({row["seed"]: tried(row, keys) for row in final}, n, "seeds of its own")
    ended = [row for row in rows if row["status"] in ENDED]
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    values: dict[Hashable, str] = {}
    kept: list[Mapping[str, Any]] = []
    lost: list[Hashable] = []
    for seed in seeds:
        others = [row for row in ended if row["seed"] != seed] if len(seeds) > 1 else ended
        best = _best(others, keys, metric)
        own = [row for row in ended if row["seed"] == seed and best is not None and tried(row, keys) == best]
        kept += own
        if best is not None:
            values[seed] = best
        if not own:
            lost.append(seed)
    how: How = "the other seeds" if len(seeds) > 1 else "the same seed"
    return kept, Choice(values, len({tried(row, keys) for row in rows}), how, tuple(lost))


def _check_one_value(final: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    values: dict[Hashable, set[str]] = {}
    for row in final:
        values.setdefault(row["seed"], set()).add(tried(row, keys))
    for seed, found in values.items():
        if len(found) > 1:
            several = f"several values of {', '.join(keys)} ({', '.join(sorted(found))})"
            why = "though one was chosen on seeds of its own: compare these sweeps one by one"
            raise UsageError(f"Seed {seed} has results at {several}, {why}.")


def _best(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str) -> str | None:
    """The value with the best mean validation figure; None where no trial has one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (score := figure(row, "validation", metric)) is not None:
            found.setdefault(tried(row, keys), []).append(score)
    means = {given: fmean(scores) for given, scores in found.items()}
    if not means:
        return None
    return min(means, key=lambda given: means[given]) if lower_is_better(metric) else max(means, key=lambda v: means[v])
