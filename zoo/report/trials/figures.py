"""Figures of trials: which there are, in which unit they are read, and which way is better."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.core.errors import unknown
from zoo.objectives.base import objectives
from zoo.report.charts import Unit
from zoo.report.units import number

SPLITS = ("test", "validation")
_LOWER = re.compile(r"(^|_)(loss|mse|mae|rmse|error|perplexity|bits_per_byte|nmse)($|_)|^ratio$")
_SHARE = re.compile(r"^(accuracy|exact|solved|scaled)")
_NO_METRIC = re.compile(r"^(n|n_rows|n_problems)$|_(low|high)$")


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures that trials have of test or validation, such as accuracy."""
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    found = [key.partition(".")[2] for key in columns if key.partition(".")[0] in SPLITS]
    return [key for key in dict.fromkeys(found) if not _NO_METRIC.search(key)]


def check_metric(rows: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    """A figure to compare: the given one, else what the trials were selected by.

    Raises:
        UsageError: no trial has it.
    """
    known = metrics_of(rows)
    if metric is None:
        chosen = selection(rows)
        return chosen if chosen in known or not known else known[0]
    if metric not in known:
        raise unknown("metric", metric, known)
    return metric


def selection(rows: Sequence[Mapping[str, Any]]) -> str:
    """The validation figure by which training selected its best weights, the objective's where configs do not say."""
    named = Counter(
        str(row.get("config.train.metric") or row.get("config.train.target.metric") or _own(row)) for row in rows
    )
    return named.most_common(1)[0][0] if named else "accuracy"


def _own(row: Mapping[str, Any]) -> str:
    """The figure of a trial's objective; accuracy where that is not known."""
    name = str(row.get("config.objective.name"))
    return objectives[name].metric if name in objectives else "accuracy"


def lower_is_better(metric: str) -> bool:
    """Whether the smaller figure is the better one."""
    return _LOWER.search(metric) is not None


def is_share(metric: str) -> bool:
    """Whether a figure is a share, from 0 to 1."""
    return _SHARE.search(metric) is not None and not lower_is_better(metric)


def unit_of(metric: str) -> Unit:
    """How it is read."""
    return "percent" if is_share(metric) else "plain"


def figure(row: Mapping[str, Any], split: str, metric: str) -> float | None:
    """A figure of a trial, None if unknown."""
    return number(row.get(f"{split}.{metric}"))
