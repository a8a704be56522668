"""The table of a comparison: for a terminal, the page, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.report import units
from zoo.report.charts import TEXT
from zoo.report.leaderboard import Cell
from zoo.report.trials.compare import Comparison, Gap
from zoo.report.trials.groups import Group
from zoo.report.units import MISSING
from zoo.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

_POINTS = 5
"""The most figures of seeds that are written out in a cell; of more, the range. The page's plot shows all."""
CLOCK = "stopped by the clock"


class Column(NamedTuple):
    """A column: its heading, what it says, and which value is best, if any."""

    title: str
    help: str
    best: str
    cell: Callable[[Comparison, Group], Cell]


def columns(comparison: Comparison) -> list[Column]:
    """The columns that have anything to say."""
    known = "trivial" if comparison.lower else "chance"
    chance = "" if comparison.chance is None else f"\n({known} {TEXT[comparison.unit](comparison.chance)})"
    best = "min" if comparison.lower else "max"
    about = (
        "Mean over seeds, its 95% interval, and the figure of each seed, of more than five the range. A group of which "
        "no seed learned has no score."
    )
    found = [
        Column(f"{comparison.metric}{chance}", about, best, _figure),
        Column("seeds\nproblems", "Seeds, and test problems that differ up to the task's symmetry.", "", _repeats),
    ]
    if any(group.learning.n for group in comparison.groups):
        text = comparison.rule.text
        found.append(Column("not\nlearned", f"{text[:1].upper()}{text[1:]}.", "", _learning))
    if comparison.best:
        about = "The value with the best validation figure; with the number of seeds that chose it, where they differ."
        found.append(Column(f"best\n{', '.join(comparison.best)}", about, "", _chosen))
    found.append(Column("ended by", "How the trials ended, and at which step.", "", _ended))
    for column, title, read, about in (
        ("parameters", "params", units.count, "Number of trained weights."),
        ("state_bytes", "state", units.size, "Memory that one sequence carries at its full length."),
    ):
        if any(group.middle(column) is not None for group in comparison.groups):
            found.append(Column(title, about, "min", _middle(column, read)))
    return found


def lines(comparison: Comparison) -> tuple[list[Column], list[list[Cell]]]:
    """The columns, and the cells of each group; the best of a column is marked, among the groups that have learned."""
    shown = columns(comparison)
    cells = [[column.cell(comparison, group) for column in shown] for group in comparison.groups]
    ranked = [line for line, group in zip(cells, comparison.groups, strict=True) if not group.learning.none]
    for at, column in enumerate(shown):
        known = [line[at].value for line in ranked if line[at].value is not None]
        if not column.best or len(set(known)) < 2:
            continue
        top = (max if column.best == "max" else min)(v for v in known if v is not None)
        text = next(line[at].text for line in ranked if line[at].value == top)
        for line in ranked:
            line[at] = line[at]._replace(best=line[at].value is not None and line[at].text == text)
    return shown, cells


def table(comparison: Comparison) -> Table:
    """The table for a terminal; the best figures are bold."""
    from rich.text import Text

    shown, cells = lines(comparison)
    result = _empty()
    result.add_column("\n".join(comparison.by) or "group", overflow="fold", min_width=10)
    for column in shown:
        result.add_column(column.title, justify="right", vertical="top", no_wrap=True)
    for group, line in zip(comparison.groups, cells, strict=True):
        texts = []
        for cell in line:
            text = Text(cell.text, style="bold green" if cell.best else "")
            texts.append(text.append(f"\n{cell.detail}", style="not bold dim default") if cell.detail else text)
        result.add_row("\n".join(group.names) or "all", *texts)
    return result


GAP_COLUMNS = (
    ("difference", "Mean of the group less that of the baseline."),
    ("95% interval", "Holds all differences of the table at once with 95% (Bonferroni)."),
    ("p", "How often so large a difference would be found if there were none, corrected for their number (Holm)."),
    ("method", "What varies in the interval, and how the two were paired."),
)


def gap_cells(comparison: Comparison, gap: Gap) -> list[str]:
    """The texts of a difference: itself, its interval, its p value and how it was found."""
    interval = gap.difference.interval
    if gap.group.learning.none or gap.baseline.learning.none:  # its figure is no score
        interval, mean = None, "not learned" if gap.group.learning.none else "baseline\nnot learned"
    else:
        mean = _signed(comparison, gap.difference.mean)
    return [
        mean,
        MISSING if interval is None else f"{_signed(comparison, interval.low)} to {_signed(comparison, interval.high)}",
        MISSING if gap.p is None else p_text(gap.p),
        gap.difference.method,
    ]


def gap_title(comparison: Comparison) -> str:
    """What differences are of."""
    base = f" to {comparison.baseline.label}" if comparison.baseline else " to the baseline"
    points = ", in percentage points" if comparison.is_share else ""
    return f"Difference in {comparison.metric}{base}{points}"


def gap_table(comparison: Comparison) -> Table:
    """The differences to the baseline, for a terminal."""
    result = _empty()
    result.add_column("\n".join(comparison.by) or "group", overflow="fold", min_width=10)
    n = len(comparison.gaps)
    for title in ("difference", f"95% interval\n(all {n})" if n > 1 else "95% interval", "p\n(Holm)" if n > 1 else "p"):
        result.add_column(title, justify="right", no_wrap=True)
    if len({gap.difference.method for gap in comparison.gaps}) > 1:
        result.add_column("method", overflow="fold")
    for gap in comparison.gaps:
        result.add_row("\n".join(gap.group.names), *gap_cells(comparison, gap)[: len(result.columns) - 1])
    return result


def p_text(p: float) -> str:
    """A p value as people read it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, with exact figures."""
    return {
        "metric": comparison.metric,
        "by": list(comparison.by),
        "best": list(comparison.best),
        "rule": comparison.rule.text,
        "groups": [_group_data(comparison, group) for group in comparison.groups],
        "differences": [_gap_data(gap) for gap in comparison.gaps],
    }


def to_csv(comparison: Comparison) -> str:
    """A line for each group, with a heading; lists as JSON."""
    out = io.StringIO()
    rows = [_group_data(comparison, group) for group in comparison.groups]
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return out.getvalue()


def _group_data(comparison: Comparison, group: Group) -> dict[str, Any]:
    scores, found, choice = group.scores, group.estimate, group.choice
    interval = None if found is None else found.interval
    return {
        **dict(zip(comparison.by, group.names, strict=True)),
        "split": group.split,
        "mean": None if found is None else found.mean,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "interval_over": "" if found is None else found.over,
        "seeds": [] if scores is None else list(scores.seeds),
        "figures": [] if scores is None else scores.figures.tolist(),
        "n_problems": _problems(group) or None,
        "chance": group.chance,
        "not_learned": group.learning.failed if group.learning.n else None,
        "judged": group.learning.n,
        "best": None if choice is None else {str(seed): given for seed, given in choice.values.items()},
        "best_of": None if choice is None else choice.n,
        "best_on": None if choice is None else choice.how,
        "ended": group.endings,
        "parameters": group.middle("parameters"),
        "state_bytes": group.middle("state_bytes"),
        "steps": [row.get("steps") for row in group.rows],
        "seconds": group.middle("seconds"),
    }


def _gap_data(gap: Gap) -> dict[str, Any]:
    interval = gap.difference.interval
    return {
        "group": list(gap.group.names),
        "baseline": list(gap.baseline.names),
        "difference": gap.difference.mean,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "p": gap.difference.p,
        "p_holm": gap.p,
        "method": gap.difference.method,
        "n_seeds": gap.difference.n_seeds,
        "n_problems": gap.difference.n_problems,
    }


def interval_text(comparison: Comparison, interval: Interval | None) -> str:
    """Such as `91.2 to 97.6`, in percent where the figure is a share; empty without one."""
    return "" if interval is None else f"{bare(comparison, interval.low)} to {bare(comparison, interval.high)}"


def bare(comparison: Comparison, figure: float) -> str:
    """A figure without its unit."""
    return f"{100 * figure:.1f}" if comparison.is_share else TEXT[comparison.unit](figure)


def points_text(comparison: Comparison, figures: Sequence[float]) -> str:
    """The figures of seeds, or their range where they are many; empty for one."""
    if len(figures) < 2:
        return ""
    if len(figures) > _POINTS:
        return f"{bare(comparison, min(figures))}…{bare(comparison, max(figures))}"
    texts = [bare(comparison, figure) for figure in figures]
    return "\n".join(" ".join(texts[at : at + 3]) for at in range(0, len(texts), 3))


def _figure(comparison: Comparison, group: Group) -> Cell:
    if group.estimate is None or group.scores is None:
        return Cell(None, "not learned" if group.learning.none else "no figure", False)
    points = points_text(comparison, group.scores.figures.tolist())
    if group.learning.none:
        clock = set(group.endings) == {CLOCK}
        return Cell(None, "stopped by\nthe clock" if clock else "not learned", False, points)
    mean = group.estimate.mean
    interval = interval_text(comparison, group.estimate.interval)
    return Cell(mean, TEXT[comparison.unit](mean), False, "\n".join(filter(None, (interval, points))))


def _problems(group: Group) -> int:
    return 0 if group.scores is None else group.scores.n_problems


def _repeats(comparison: Comparison, group: Group) -> Cell:
    seeds, problems = 0 if group.scores is None else len(group.scores.seeds), _problems(group)
    return Cell(seeds or None, str(seeds) if seeds else MISSING, False, units.count(problems) if problems else "")


def _learning(comparison: Comparison, group: Group) -> Cell:
    share = group.learning.failed / group.learning.n if group.learning.n else None
    return Cell(share, group.learning.text or MISSING, False)


def _chosen(comparison: Comparison, group: Group) -> Cell:
    if group.choice is None or not group.choice.values:
        return Cell(None, MISSING, False)
    numbers = list(group.choice.values.values())
    try:
        value = float(numbers[0]) if len(set(numbers)) == 1 else None
    except ValueError:
        value = None
    return Cell(value, group.choice.text.replace("), ", ")\n"), False, f"of {group.choice.n}")


def _ended(comparison: Comparison, group: Group) -> Cell:
    ends = group.endings
    text = next(iter(ends)) if len(ends) == 1 else "\n".join(f"{how} ({n})" for how, n in ends.items())
    steps = sorted(int(v) for row in group.rows if (v := row.get("steps")) is not None)
    span = "" if not steps else f"at {units.count(steps[0])}" + (f"…{steps[-1]}" if steps[-1] > steps[0] else "")
    return Cell(fmean(steps) if steps else None, text.replace(" by ", "\nby ") or MISSING, False, span)


def _middle(column: str, text: Callable[[float], str]) -> Callable[[Comparison, Group], Cell]:
    def cell(comparison: Comparison, group: Group) -> Cell:
        value = group.middle(column)
        return Cell(value, MISSING if value is None else text(value), False)

    return cell


def _signed(comparison: Comparison, difference: float) -> str:
    return f"{100 * difference:+.1f}" if comparison.is_share else f"{difference:+.3g}"


def _empty() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False)
