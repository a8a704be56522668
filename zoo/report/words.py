"""What the figures say, in words: the headline, its highlights, and what to keep in mind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zoo.report import units
from zoo.report.groups import Group, groups
from zoo.report.labels import extended_at, labels
from zoo.report.layers import same_layers
from zoo.report.leaderboard import ordered
from zoo.report.records import Record
from zoo.report.runs import Run


class Highlight(NamedTuple):
    """A best figure: what for, who has it, the figure, and a word on it."""

    title: str
    names: list[str]
    value: str
    remark: str


def highlights(runs: Sequence[Run]) -> list[Highlight]:
    """Who is most accurate, soonest, smallest and fastest, as far as the runs tell. Equals share a place."""
    runs = ordered(runs)
    found = []
    if (over_seeds := _best_over_seeds(groups(runs))) is not None:
        found.append(over_seeds)
    for title, key, pick, text, remark in (
        ("Most accurate", "accuracy", max, units.percent, _of_examples),
        ("Least error", "mse", min, units.plain, _of_examples),
        ("Soonest at the target", "seconds_to_target", min, units.duration, _at_accuracy),
        ("Smallest state", "state_bytes", min, units.size, _at_accuracy),
        ("Fastest training", "tokens_per_second", max, lambda v: f"{units.count(v)} tok/s", _at_accuracy),
    ):
        best = None if found and title == found[0].title else _best(runs, key, pick, text)
        if best:
            names, run, value = best
            found.append(Highlight(title, names, value, remark(run)))
    return found


def summary(runs: Sequence[Run]) -> str:
    """Two sentences: who is most accurate, and who is fastest and smallest; of one run, how it did."""
    if len(runs) == 1:
        return _portrait(runs[0])
    names = Counter(str(run.section("task").get("name", "unknown")) for run in runs)
    if len({_key(run.section("task")) for run in runs}) > 1:
        return f"{len(runs)} runs of different tasks: {', '.join(f'{name} ({n})' for name, n in names.most_common())}."
    best = {h.title: h for h in highlights(runs)}
    sentences = []
    if h := best.get("Most accurate"):
        verb = "answers" if len(h.names) == 1 else "answer"
        first = f"{listed(h.names)} {verb} best, with {h.value} right{h.remark and ' ' + h.remark}"
        known = _others(runs, h.names)
        if known:
            others = "the other" if len(known) == 1 else f"the other {len(known)}"
            reach = units.percent(known[0])
            spread = reach if units.percent(known[-1]) == reach else f"{units.percent(known[-1])} to {reach}"
            first += f"; {others} reach{'es' if len(known) == 1 else ''} {spread}"
        sentences.append(first + ".")
    parts = []
    if h := best.get("Soonest at the target"):
        parts.append(f"{listed(h.names)} {'is' if len(h.names) == 1 else 'are'} soonest at the target ({h.value})")
    elif h := best.get("Fastest training"):
        parts.append(f"{listed(h.names)} {'trains' if len(h.names) == 1 else 'train'} fastest ({h.value})")
    if h := best.get("Smallest state"):
        remark = f", {h.remark}" if h.remark else ""
        verb = "carries" if len(h.names) == 1 else "carry"
        parts.append(f"{listed(h.names)} {verb} the smallest state ({h.value}{remark})")
    if parts:
        sentences.append(", and ".join(parts) + ".")
    return " ".join(sentences) or "These runs hold no figures yet."


def _others(runs: Sequence[Run], names: Sequence[str]) -> list[float]:
    """The accuracies of all but those named, the best first: of groups of seeds their means."""
    runs = ordered(runs)
    found = groups(runs)
    if all(len(group.seeds) < 2 for group in found):
        rest = [r.figure("accuracy") for r, label in zip(runs, labels(runs), strict=True) if label not in names]
    else:
        spreads_of = [(g, g.over_seeds("accuracy")) for g in found if g.label not in names]
        rest = [spread.mean if spread else g.runs[0].figure("accuracy") for g, spread in spreads_of]
    return sorted((a for a in rest if a is not None), reverse=True)


def _portrait(run: Run) -> str:
    accuracy, error, share, sooner, state = (
        run.figure(key) for key in ("accuracy", "mse", "mse_ratio", "seconds_to_target", "state_bytes")
    )
    if accuracy is None and error is None:
        return f"{run.name} has no figures yet."
    parts = [] if sooner is None else [f"met its target after {units.duration(sooner)}"]
    parts += [] if state is None else [f"carries a state of {units.size(state)}"]
    second = f" It {' and '.join(parts)}." if parts else ""
    if accuracy is None and error is not None:
        beside = "" if share is None else f", {units.percent(share)} of the trivial predictor's,"
        return f"{run.name} has a mean squared error of {units.plain(error)}{beside} {_of_examples(run)}.{second}"
    return f"{run.name} answers {units.percent(accuracy or 0.0)} right {_of_examples(run)}.{second}"


def caveats(runs: Sequence[Run], measurements: Sequence[Record] = ()) -> list[str]:
    """What keeps the figures from being compared like with like, a sentence each."""
    runs = ordered(runs)
    named = list(zip(runs, labels(runs), strict=True))
    found = []
    if len({_key(run.section("task")) for run in runs if run.section("task")}) > 1:
        found.append("The runs are of different tasks or task options: their accuracies do not compare.")
    found += machines("The runs are from", [run.result.get("machine") for run in runs])
    found += machines("The layers were measured on", [r.machine for r in measurements])
    if len(precisions := {str(p) for run in runs if (p := run.result.get("precision"))}) > 1:
        found.append(f"The runs computed in different precisions ({', '.join(sorted(precisions))}).")
    splits = {split for run in runs if (split := run.scores()[1])}
    if len(splits) > 1:
        early = [label for run, label in named if run.scores()[1] == "validation"]
        found.append(f"{listed(early)}: accuracy on validation examples, as the test was not read.")
    found += _same_models(named)
    if stopped := [label for run, label in named if run.has_ended and run.ending]:
        found.append(f"{listed(stopped)}: stopped by the clock, with figures as far as training came by then.")
    for run, label in named:
        if steps := extended_at(run):
            told = f"given more steps at step {listed([str(step) for step in steps])}"
            found.append(f"{label}: {told}; its learning rate is not that of a single training.")
        if not run.has_ended:
            found.append(f"{label}: {run.ending}; its figures are as far as it came.")
    return found


def machines(which: str, given: Sequence[Any]) -> list[str]:
    """That machines differ, or else the numbers of threads used on one."""
    known = [m for m in given if isinstance(m, dict) and m]
    if len({_key({k: v for k, v in m.items() if k != "threads"}) for m in known}) > 1:
        return [f"{which} different machines: their times and speeds do not compare."]
    threads = sorted({str(m["threads"]) for m in known if "threads" in m})
    if len(threads) > 1:
        return [f"{which} one machine with different numbers of threads ({', '.join(threads)}): compare no times."]
    return []


def _same_models(named: Sequence[tuple[Run, str]]) -> list[str]:
    """That runs of different patterns trained the same layers, as words with one head each may be."""
    alike: dict[tuple[Any, ...], dict[str, str]] = {}
    for run, label in named:
        sizes = tuple(run.figure(k) for k in ("n_parameters", "state_bytes", "flops_per_token"))
        width = run.section("model").get("d_model")
        if run.pattern and isinstance(width, int) and None not in sizes:
            alike.setdefault((width, *sizes), {}).setdefault(run.pattern, label)
    groups_of = (
        [patterns[pattern] for pattern in group]
        for (width, *_), patterns in alike.items()
        if len(patterns) > 1
        for group in same_layers(patterns, width)
    )
    return [f"{listed(group)} are the same layers under other names." for group in groups_of if len(group) > 1]


def spreads(runs: Sequence[Run]) -> list[str]:
    """Accuracy over seeds, of runs that differ in nothing but name, folder and seed; and what was not repeated."""
    several = [group for group in groups(ordered(runs)) if len(group.seeds) > 1]
    found = []
    for group in several:
        told = [spread.text() for key in ("accuracy", "exact", "mse") if (spread := group.over_seeds(key))]
        ended = [run for run in group.runs if run.has_ended]
        targets = [run for run in ended if run.section("train").get("target")]
        if targets:
            told.append(
                f"target met by {sum(run.figure('seconds_to_target') is not None for run in targets)} of {len(targets)}"
            )
        if len(ended) < len(group.runs):
            told.append(f"{len(group.runs) - len(ended)} of {len(group.runs)} runs not ended, and left out here")
        if told:
            found.append(f"{group.label}: {'; '.join(told)}")
    return found


def repeats(runs: Sequence[Run]) -> str:
    """Which runs have one seed only, whose small differences may be luck; empty where all were repeated."""
    found = groups(ordered(runs))
    single = [group.label for group in found if len(group.seeds) < 2]
    if not single or len(runs) < 2:
        return ""
    which = (
        "One seed each"
        if len(single) == len(found)
        else f"{listed(single)}: one seed{'' if len(single) == 1 else ' each'}"
    )
    return f"{which}: small differences may be luck"


def _best_over_seeds(found: Sequence[Group]) -> Highlight | None:
    """Who is most accurate by the mean over seeds; None where no run was repeated."""
    if all(len(group.seeds) < 2 for group in found):
        return None
    means: list[tuple[float, Group]] = []
    for group in found:
        spread = group.over_seeds("accuracy")
        value = spread.mean if spread else group.runs[0].figure("accuracy")
        if value is not None:
            means.append((value, group))
    if not means:
        return None
    best = units.percent(max(mean for mean, _ in means))
    holders = [group for mean, group in means if units.percent(mean) == best]
    seeds = len(holders[0].seeds)
    remark = f"{_of_examples(holders[0].runs[0])}, {f'mean of {seeds} seeds' if seeds > 1 else 'one seed'}"
    return Highlight("Most accurate", [group.label for group in holders], best, remark)


def _best(
    runs: Sequence[Run], key: str, pick: Callable[..., float], text: Callable[[float], str]
) -> tuple[list[str], Run, str] | None:
    known = [
        (run, label, v) for run, label in zip(runs, labels(runs), strict=True) if (v := run.figure(key)) is not None
    ]
    if not known:
        return None
    value = text(pick(v for _, _, v in known))
    holders = [(run, label) for run, label, v in known if text(v) == value]
    return [label for _, label in holders], holders[0][0], value


def _of_examples(run: Run) -> str:
    figures, split = run.scores()
    n = units.number(figures.get("n"))
    return f"on {units.count(n)} unseen {split} examples" if n else f"on {split} examples"


def _at_accuracy(run: Run) -> str:
    accuracy, error = run.figure("accuracy"), run.figure("mse")
    if accuracy is None and error is not None:
        return f"at an error of {units.plain(error)}"
    return "" if accuracy is None else f"at {units.percent(accuracy)} accuracy"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them, the first two of many."""
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
