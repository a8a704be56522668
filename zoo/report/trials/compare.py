"""A comparison of trials: groups with their figures, and differences to a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from zoo.core.errors import UsageError, closest, quoted
from zoo.report.charts import Unit
from zoo.report.trials.figures import check_metric, is_share, lower_is_better, unit_of
from zoo.report.trials.groups import Group, default_keys, grouped, ranked
from zoo.report.trials.learning import Rule
from zoo.report.trials.source import SEEDS, Trials
from zoo.statistics import Difference, difference, holm

CONFIDENCE = 0.95


class Question(NamedTuple):
    """What to compare; `compare` says what each is."""

    by: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    baseline: str | None = None
    metric: str | None = None
    learned: str | None = None

    @classmethod
    def read(
        cls,
        by: Sequence[str] | None,
        best: Sequence[str] | None,
        baseline: str | None,
        metric: str | None,
        learned: str | None,
    ) -> Question | None:
        """The options of `zoo compare`, keys given one by one or with commas; None where none was given."""
        asked = cls(_keys(by), _keys(best), baseline, metric, learned)
        return asked if by or best or (baseline, metric, learned) != (None, None, None) else None


def _keys(given: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.strip() for text in given or () for key in text.split(",") if key.strip()))


class Gap(NamedTuple):
    """The difference of a group to the baseline.

    Attributes:
        group, baseline: the two.
        difference: its interval is corrected for the number of differences (Bonferroni).
        p: corrected for it too (Holm); None without an interval.
    """

    group: Group
    baseline: Group
    difference: Difference
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """Groups of trials and what they scored.

    Attributes:
        trials: what was compared.
        by: the keys of the groups.
        best: the keys of which the best value was chosen.
        metric: the figure that is compared.
        rule: when a seed has learned.
        groups: the best first.
        gaps: to the baseline; none without one.
    """

    trials: Trials
    by: tuple[str, ...]
    best: tuple[str, ...]
    metric: str
    rule: Rule
    groups: list[Group]
    gaps: list[Gap]

    @property
    def lower(self) -> bool:
        """Whether the smaller figure is the better one."""
        return lower_is_better(self.metric)

    @property
    def is_share(self) -> bool:
        return is_share(self.metric)

    @property
    def unit(self) -> Unit:
        """How the figure is read."""
        return unit_of(self.metric)

    @cached_property
    def chance(self) -> float | None:
        """The figure of a constant answer, where it is one for all groups."""
        chances = {group.chance for group in self.groups}
        return chances.pop() if len(chances) == 1 else None

    @property
    def baseline(self) -> Group | None:
        """The one baseline of all differences, None without one or where there are several."""
        found = {id(gap.baseline): gap.baseline for gap in self.gaps}
        return next(iter(found.values())) if len(found) == 1 else None


def compare(
    trials: Trials,
    by: Sequence[str] = (),
    *,
    best: Sequence[str] = (),
    baseline: str | None = None,
    metric: str | None = None,
    learned: str | None = None,
) -> Comparison:
    """Group trials, and give the figures of each group.

    Args:
        trials: of sweeps, or ordinary runs.
        by: keys such as `words.mixer`; by default what the sweeps varied, but for seeds and what is chosen.
        best: keys such as `train.lr`, of which each group takes the value that is best on validation.
        baseline: a value of one of the keys; every other group is compared to the group that has it.
        metric: the figure, such as accuracy; by default what the trials were selected by.
        learned: `chance` (the default), or the figure from which on a seed has learned.

    Raises:
        UsageError: a key, metric or baseline that is not there, or trials that are no repeats of one another.
    """
    if not trials.rows:
        raise UsageError(f"{trials.name} holds no trial yet.")
    chosen = [trials.check(key, "--best") for key in best] or [key for key in trials.chosen if key not in by]
    keys = [trials.check(key, "--by") for key in by] if by else default_keys(trials, chosen)
    if aside := [key for key in chosen if key in (*keys, *SEEDS)]:
        why = "a seed is no setting" if aside[0] in SEEDS else "groups are told apart by it"
        raise UsageError(f"--best {aside[0]!r} is not allowed: {why}.")
    if seeds := [key for key in keys if key in SEEDS]:
        raise UsageError(f"--by {seeds[0]!r} is not allowed: figures are means over seeds.")
    figure = check_metric(trials.rows, metric)
    lower = lower_is_better(figure)
    rule = Rule.read(learned, lower)
    groups = ranked(grouped(trials, keys, chosen, figure, rule), lower)
    return Comparison(trials, tuple(keys), tuple(chosen), figure, rule, groups, _gaps(groups, keys, baseline))


def _gaps(groups: Sequence[Group], by: Sequence[str], baseline: str | None) -> list[Gap]:
    """The difference of every group with figures to the baseline, in the order of the groups."""
    if baseline is None:
        return []
    at, names = _position(groups, baseline)
    pairs = []
    for group in groups:
        reference = next(
            (g for g in groups if g.names[at] == names and g.names[:at] + g.names[at + 1 :] == _others(group, at)), None
        )
        if reference is not None and reference is not group and group.scores and reference.scores:
            pairs.append((group, reference))
    level = 1 - (1 - CONFIDENCE) / max(len(pairs), 1)
    found = [difference(g.scores, r.scores, level) for g, r in pairs if g.scores and r.scores]
    corrected = iter(holm([each.p for each in found if each.p is not None]))
    return [
        Gap(group, reference, each, None if each.p is None else next(corrected))
        for (group, reference), each in zip(pairs, found, strict=True)
    ]


def _others(group: Group, at: int) -> tuple[str, ...]:
    return group.names[:at] + group.names[at + 1 :]


def _position(groups: Sequence[Group], baseline: str) -> tuple[int, str]:
    """The key that a baseline is a value of, and the name that its groups have there.

    Raises:
        UsageError: no group, or values of several keys.
    """
    found = {
        (at, name) for group in groups for at, name in enumerate(group.names) if baseline in (name, *name.split(" = "))
    }
    if len(found) == 1:
        return next(iter(found))
    known = list(dict.fromkeys(name for group in groups for names in group.names for name in names.split(" = ")))
    if found:
        raise UsageError(f"--baseline {quoted(baseline)} is a value of several keys: group by one of them.")
    listed = ", ".join(known) or "none"
    raise UsageError(f"--baseline {quoted(baseline)} is no group.{closest(baseline, known)} Available: {listed}.")


__all__ = ["CONFIDENCE", "Comparison", "Gap", "Question", "compare"]
