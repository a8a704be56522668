"""Trials grouped by keys: the figures of each group over its seeds and the test problems."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError
from zoo.report.chance import chance_of
from zoo.report.labels import ASIDE
from zoo.report.layers import joined, same_layers
from zoo.report.runs import ENDED
from zoo.report.trials.choice import Choice, choose, tried
from zoo.report.trials.figures import SPLITS, figure, is_share, lower_is_better, selection
from zoo.report.trials.learning import Learning, Rule
from zoo.report.trials.source import CHOOSE, SEEDS, RowFigures, Trials, value, varying
from zoo.report.units import number, printable
from zoo.statistics import Estimate, Scores, estimate
from zoo.statistics.scores import Rows

_ENDINGS = {
    "target": "target",
    "finished": "steps",
    "time_budget": "stopped by the clock",
    "pruned": "stopped by ASHA",
    "failed": "failed",
    "interrupted": "interrupted",
    "running": "not ended",
}
_TASK = "config.task."
_CHANCE_ROWS = 512  # of a task whose rows take long to draw it is a second or two
_NAMES = ("model.pattern", "name")  # keys in which one layer may have several names
_NAMED = 3  # keys named in an error


@dataclass(frozen=True)
class Group:
    """Trials that differ in nothing but their seed, after the choice of a best value.

    Attributes:
        names: texts of the keys that it is grouped by; of layers that are one, all their names.
        rows: the trials that enter the figures.
        every: all trials of the group, of other values and stages too.
        scores: figures of the seeds, None where no trial has one.
        split: of the figures, "test" or "validation".
        choice: of a best value, None without one.
        learning: which seeds learned.
        chance: the figure of a constant answer, of errors that of the task's trivial predictor; None where unknown.
    """

    names: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    every: Sequence[Mapping[str, Any]]
    scores: Scores | None
    estimate: Estimate | None
    split: str
    choice: Choice | None
    learning: Learning
    chance: float | None
    order: Sequence[Any] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        return ", ".join(self.names) or "all trials"

    @property
    def endings(self) -> dict[str, int]:
        """How the trials that enter the figures ended, and how many of the group did not end, in words."""
        ends = Counter(str(row["status"]) for row in self.rows)
        for row in self.every:
            if row["status"] not in ENDED and row["stage"] != CHOOSE:
                ends[str(row["status"])] += 1
        order = sorted(ends, key=lambda status: list(_ENDINGS).index(status) if status in _ENDINGS else 99)
        return {_ENDINGS.get(status, printable(status)): ends[status] for status in order}

    def middle(self, column: str) -> float | None:
        """The median of a column, such as parameters."""
        known = [v for row in self.rows if (v := number(row.get(column))) is not None]
        return median(known) if known else None


def grouped(trials: Trials, by: Sequence[str], best: Sequence[str], metric: str, rule: Rule) -> list[Group]:
    """The groups, the best first; those that have not learned, and those without a figure, last.

    Raises:
        UsageError: trials of one group differ in more than their seed.
    """
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in trials.rows:
        found.setdefault(tuple(named(value(row, key)) for key in by), []).append(row)
    for names, rows in found.items():
        _check_alike(names, rows, by, best)
    return [_group(trials, names, rows, by, best, metric, rule) for names, rows in _merged(found, by, best).items()]


def default_keys(trials: Trials, best: Sequence[str]) -> list[str]:
    """What sweeps varied, but for seeds and what the best value is chosen of; of ordinary runs their name."""
    return [key for key in trials.swept if key not in (*SEEDS, *best)] if trials.swept else ["name"]


def _group(
    trials: Trials,
    names: tuple[str, ...],
    every: Sequence[Mapping[str, Any]],
    by: Sequence[str],
    best: Sequence[str],
    metric: str,
    rule: Rule,
) -> Group:
    if best:
        kept, choice = choose(every, best, selection(every))
    else:
        kept, choice = [row for row in every if row["stage"] != CHOOSE], None
    rows = [row for row in kept if row["status"] in ENDED]
    split = next((s for s in SPLITS if any(figure(row, s, metric) is not None for row in rows)), "")
    rows = [row for row in rows if not split or figure(row, split, metric) is not None]
    scores = _scores(trials, rows, split, metric)
    chances = _chances(rows if lower_is_better(metric) else every, split, metric)
    chance = chances.pop() if len(chances) == 1 else None
    learning = rule.judge(scores, chance, _n_problems(rows, split))
    diverged = _diverged(every, best, choice)
    if learning.n or scores is None:
        learning = Learning(learning.n + diverged, learning.learned)
    return Group(
        names,
        rows,
        every,
        scores,
        None if scores is None else estimate(scores, share=is_share(metric), positive=lower_is_better(metric)),
        split,
        choice,
        learning,
        chance,
        order=[value(every[0], key) for key in by],
    )


def _diverged(every: Sequence[Mapping[str, Any]], best: Sequence[str], choice: Choice | None) -> int:
    """How many seeds have no figure because their training diverged: they did not learn."""
    trials = [row for row in every if row["stage"] != CHOOSE]
    if choice is not None:
        trials = [row for row in trials if tried(row, best) == choice.values.get(row["seed"])]
    ended = {row["seed"] for row in trials if row["status"] in ENDED}
    return len({row["seed"] for row in trials if row.get("diverged")} - ended)


def _scores(trials: Trials, rows: Sequence[Mapping[str, Any]], split: str, metric: str) -> Scores | None:
    """The figures by seed; trials of one seed, as of layers that are one, count as their mean."""
    by_seed: dict[Hashable, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"] if row["seed"] is not None else f"trial {row['trial']}", []).append(row)
    if not split or not by_seed:
        return None
    seeds = sorted(by_seed, key=lambda seed: (isinstance(seed, str), seed))
    figures = [fmean(figure(row, split, metric) or 0.0 for row in by_seed[seed]) for seed in seeds]
    tests = [[trials.tests(row["trial"]) for row in by_seed[seed]] for seed in seeds] if split == "test" else []
    return Scores(seeds, np.array(figures), _rows(tests, metric))


def _rows(tests: Sequence[Sequence[RowFigures | None]], metric: str) -> Rows | None:
    """The scores of the test rows that all seeds share; None where they do not."""
    each = [[None if test is None else row_values(test, metric) for test in of_seed] for of_seed in tests]
    if not tests or any(values is None or not len(values) for of_seed in each for values in of_seed):
        return None
    problems = tests[0][0].problem  # type: ignore[union-attr]
    if any(not np.array_equal(test.problem, problems) for of_seed in tests for test in of_seed):  # type: ignore[union-attr]
        return None
    values = np.stack([np.mean(of_seed, 0) for of_seed in each]).astype(float)  # type: ignore[arg-type]
    return Rows(values, problems) if np.isfinite(values).all() else None


def row_values(test: RowFigures, metric: str) -> NDArray[Any] | None:
    """What each test row adds to a figure, so that their mean is the figure; None where that is not known.

    The ratio R of a mean error to that of the trivial predictor is no mean of rows. To first order it varies as the
    mean of R + (error - R trivial) / mean(trivial) does (a ratio of means, linearised as in survey sampling).
    """
    if metric != "mse_ratio":
        return test.figures.get(metric)
    errors, trivial = test.figures.get("mse"), test.figures.get("trivial_mse")
    if errors is None or trivial is None or not trivial.mean():
        return None
    ratio = errors.mean() / trivial.mean()
    found: NDArray[Any] = ratio + (errors - ratio * trivial) / trivial.mean()
    return found


def _chances(rows: Sequence[Mapping[str, Any]], split: str, metric: str) -> set[float | None]:
    """What an answer that has learned nothing gets: of accuracy the best constant one, of errors the trivial one."""
    if metric in ("accuracy", "exact"):
        return {_chance(row, metric) for row in rows}
    if metric == "mse":
        return {figure(row, split, "trivial_mse") for row in rows}
    return {1.0} if metric == "mse_ratio" else set()


def _chance(row: Mapping[str, Any], metric: str) -> float | None:
    """The figure of a constant answer: accuracy as the trial has it, else of its task; None if unknown."""
    known = number(row.get("chance")) if metric == "accuracy" else None
    task = task_of(row)
    if known is not None or "name" not in task:
        return known
    try:
        return chance_of(task, _CHANCE_ROWS, metric)
    except (
        UsageError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
    ):  # a task of another version, or without such an answer
        return None


def task_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The name and the options of a trial's task; lists are stored as JSON."""
    given = {k.removeprefix(_TASK): v for k, v in row.items() if k.startswith(_TASK) and v is not None}
    return {k: json.loads(v) if isinstance(v, str) and v[:1] in ("[", "{") else v for k, v in given.items()}


def _n_problems(rows: Sequence[Mapping[str, Any]], split: str) -> int:
    """How many problems a figure rests on, by the runs' own count; 0 where unknown."""
    known = [n for row in rows if (n := number(row.get(f"{split}.n_problems"))) is not None]
    return int(min(known, default=0))


def _check_alike(
    names: tuple[str, ...], rows: Sequence[Mapping[str, Any]], by: Sequence[str], best: Sequence[str]
) -> None:
    """Refuse a group whose trials differ in more than their seed, the best value and what follows from it."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tried(row, best), []).append(row)
    for cell in cells.values():
        keys = [key for key in varying(cell) if key not in by and not _of_words(key)]
        if not keys:
            continue
        swept = [k for k in dict.fromkeys(c[4:] for c in cell[0] if c.startswith("set.")) if k not in (*by, *best)]
        told = [key for key in swept if len({named(value(row, key)) for row in cell}) > 1 and key not in SEEDS] or keys
        many = len(told) - _NAMED
        listed = ", ".join(told[:_NAMED]) + (f" and {many} more" if many > 0 else "")
        where = f"The trials of {', '.join(names)!r}" if by else "The trials"
        raise UsageError(
            f"{where} differ in {listed} too, so that they are no repeats of one another. Group by it as well "
            f"(--by {','.join([*by, told[0]])}), or choose its best value (--best {told[0]})."
        )


def _of_words(key: str) -> bool:
    """Whether a key only names what the pattern holds."""
    return key == "variant" or key.startswith("words.")


def _merged(
    found: Mapping[tuple[str, ...], list[Mapping[str, Any]]], by: Sequence[str], best: Sequence[str]
) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """The groups, those of layers that are one at their width together, under all their names."""
    alike: dict[str, list[tuple[str, ...]]] = {}
    for names, rows in found.items():
        first = rows[0]
        sizes = tuple(first.get(k) for k in ("config.model.d_model", "parameters", "state_bytes", "flops_per_token"))
        other = [str(value(first, key)) for key in by if key not in _NAMES and not _of_words(key)]
        aside = {f"config.{key}" for key in (*best, *_NAMES, *ASIDE)}
        rest = {
            k: v
            for k, v in first.items()
            if k.startswith("config.") and k not in aside and not _of_words(k.removeprefix("config."))
        }
        alike.setdefault(f"{sizes}{other}{sorted(rest.items())}" if None not in sizes else f"alone {names}", []).append(
            names
        )
    same: dict[tuple[str, ...], tuple[str, ...]] = {}
    for group in alike.values():
        patterns = {str(found[names][0].get("config.model.pattern")): names for names in group}
        if len(group) < 2 or len(patterns) < len(group):
            continue
        width = found[group[0]][0]["config.model.d_model"]
        for layer in same_layers(patterns, int(width)):
            members = [patterns[pattern] for pattern in layer]
            title = tuple(joined(list(dict.fromkeys(parts))) for parts in zip(*members, strict=True))
            same.update(dict.fromkeys(members, title))
    merged: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for names, rows in found.items():
        merged.setdefault(same.get(names, names), []).extend(rows)
    return merged


def ranked(groups: Sequence[Group], lower: bool) -> list[Group]:
    """The best first; groups of which no seed learned, and those without a figure, last."""

    def rank(group: Group) -> tuple[bool, bool, float]:
        mean = math.inf if group.estimate is None else group.estimate.mean
        return group.estimate is None, group.learning.none, mean if lower else -mean

    return sorted(groups, key=rank)


def named(given: Any) -> str:
    """A value of a key as groups have it in their names."""
    return f"{given:g}" if isinstance(given, float) else printable("default" if given is None else given)
