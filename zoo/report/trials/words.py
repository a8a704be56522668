"""What to keep in mind of a comparison of trials, a sentence each."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.report import units
from zoo.report.charts import TEXT
from zoo.report.trials.choice import Choice
from zoo.report.trials.compare import Comparison
from zoo.report.trials.figures import selection
from zoo.report.trials.groups import Group
from zoo.report.trials.source import CHOOSE
from zoo.report.words import listed, machines


def summary(comparison: Comparison) -> str:
    """Which group is best, in a sentence; whether the next one differs is for the differences to say."""
    trials = comparison.trials
    n = len(trials.rows)
    groups = comparison.groups
    n_groups = len(groups)
    head = f"{n} trial{'' if n == 1 else 's'} in {n_groups} group{'' if n_groups == 1 else 's'}."
    known = [group for group in groups if group.estimate is not None and not group.learning.none]
    if not known or known[0].estimate is None or known[0].scores is None:
        return f"{head} No group has {'learned' if any(group.learning.none for group in groups) else 'a figure yet'}."
    first, figure = known[0], known[0].estimate
    text = TEXT[comparison.unit]
    interval = figure.interval
    span = "" if interval is None else f", 95% interval {text(interval.low)} to {text(interval.high)}"
    seeds = len(first.scores.seeds) if first.scores else 0
    over = f"over {seeds} seeds" if seeds > 1 else "with one seed"
    return f"{head} {first.label} has the best mean {comparison.metric}: {text(figure.mean)} {over}{span}."


def notes(comparison: Comparison) -> list[str]:
    """What the figures are: split, intervals, choice and correction."""
    groups = [group for group in comparison.groups if group.estimate is not None]
    found = []
    splits = sorted({group.split for group in groups if group.split})
    if splits:
        found.append(f"{comparison.metric.capitalize()} of {' or '.join(splits)} rows: the mean over seeds")
    for over in dict.fromkeys(group.estimate.over for group in groups if group.estimate):
        which = [group.label for group in groups if group.estimate and group.estimate.over == over]
        of = "" if len(which) == len(groups) else f" of {listed(which)}"
        found.append(f"95% intervals{of} are over {over}" if over else f"No interval{of}: one seed, and no test rows")
    if any(group.learning.n for group in groups):
        found.append(f"Not learned: {comparison.rule.text}")
    elif comparison.metric == "accuracy" and comparison.rule.threshold is None and groups:
        found.append("Whether seeds learned is unknown: chance is not recorded (name a threshold: --learned 0.9)")
    if comparison.best:
        found += _choices(comparison)
    if comparison.gaps:
        n = len(comparison.gaps)
        methods = {gap.difference.method for gap in comparison.gaps}
        how = f": {methods.pop()}" if len(methods) == 1 else ""
        found.append(
            f"{n} differences{how}; p values are Holm's, intervals hold all {n} at once with 95% (Bonferroni), so that "
            "an interval may hold 0 where p is below 0.05"
            if n > 1
            else f"One difference{how}; nothing to correct for"
        )
    return found


def caveats(comparison: Comparison) -> list[str]:
    """What keeps the figures from being compared like with like."""
    rows = [row for group in comparison.groups for row in group.rows]
    groups = comparison.groups
    found = []
    if len({_section(row, "config.task.") for row in rows}) > 1:
        found.append("The trials are of different tasks or task options: their figures do not compare.")
    found += machines("The trials are from", [_fields(row, "machine.") for row in rows])
    splits = {group.split for group in groups if group.split}
    if len(splits) > 1:
        early = [group.label for group in groups if group.split == "validation"]
        found.append(f"{listed(early)}: figures of validation rows, as the test was not read.")
    if single := [group.label for group in groups if group.scores and len(group.scores.seeds) < 2]:
        which = "One seed each" if len(single) == len(groups) > 1 else f"{listed(single)}: one seed"
        found.append(f"{which}: small differences may be luck.")
    if clock := [group.label for group in groups if "stopped by the clock" in group.endings]:
        found.append(f"{listed(clock)}: stopped by the clock, with figures as far as training came by then.")
    found += _not_ended(groups)
    if n := comparison.trials.missing:
        found.append(f"{n} of {n + len(comparison.trials.rows)} trials have not been started.")
    lost = {group.label: group.choice.lost for group in groups if group.choice and group.choice.lost}
    for label, seeds in lost.items():
        found.append(
            f"{label}: no figure of seed {', '.join(map(str, seeds))}, whose trial of the best value did not end."
        )
    return found


def _not_ended(groups: Sequence[Group]) -> list[str]:
    """Trials that enter no mean, by their reason."""
    found = []
    every = [row for group in groups for row in group.every]
    counted = Counter(str(row["status"]) for row in every)
    if n := counted["pruned"]:
        found.append(f"{n} of {len(every)} trials were stopped by ASHA, and enter no mean.")
    if n := counted["failed"]:
        reasons = Counter(str(row["reason"]) for row in every if row["status"] == "failed" and row["reason"])
        why = f" ({_first_sentence(units.printable(reasons.most_common(1)[0][0]))})" if reasons else ""
        found.append(f"{n} of {len(every)} trials failed, and enter no mean{why}.")
    if n := sum(bool(row.get("diverged")) for row in every):
        found.append(f"{n} of these diverged: such a seed counts as one that did not learn.")
    if n := counted["interrupted"] + counted["running"]:
        found.append(f"{n} of {len(every)} trials have not ended, and enter no mean.")
    return found


def _first_sentence(text: str) -> str:
    return textwrap.shorten(text.partition(". ")[0], 160, placeholder=" …").rstrip(".")


def _choices(comparison: Comparison) -> list[str]:
    """How the best values were chosen."""
    key = ", ".join(comparison.best)
    by_how: dict[str, list[Choice]] = {}
    for group in comparison.groups:
        if group.choice is not None:
            by_how.setdefault(group.choice.how, []).append(group.choice)
    metric = selection(comparison.trials.rows)
    found = []
    for how, choices in by_how.items():
        counts = sorted({choice.n for choice in choices})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        text = f"{key}: the best of {n} by validation {metric}"
        if how == "seeds of its own":
            chosen_on = {row["seed"] for row in comparison.trials.rows if row["stage"] == CHOOSE}
            text += f", chosen on seeds of its own ({', '.join(map(str, sorted(chosen_on, key=str)))})"
        elif how == "the other seeds":
            text += ", for each seed chosen on the other seeds"
        else:
            text += ", chosen on the one seed that is shown: the choice is not independent of the figure"
        found.append(text)
    return found


def _section(row: Mapping[str, Any], prefix: str) -> str:
    return json.dumps(_fields(row, prefix), sort_keys=True, default=str)


def _fields(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and v is not None}
