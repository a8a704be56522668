"""Recall against the bytes of the state: the sweep `recall-state`, at two widths.

    python -m zoo.benchmarks.studies.recall_state

makes the page from the stores `recall-state-64` and `recall-state-128`.
"""

from __future__ import annotations

from statistics import fmean

from zoo.benchmarks.studies.harness import table
from zoo.benchmarks.studies.sweep_study import (
    Read,
    Stored,
    SweepStudy,
    by_slice,
    code,
    comparison_table,
    gap_table,
)
from zoo.report.charts import Axis, Chart, Panel, Row, Series
from zoo.report.static import svg
from zoo.report.trials.compare import Comparison, compare

KEY, LEARNED, BASELINE = "words.layers", "0.9", "mha(n_heads=4)"
WIDTHS = (64, 128)

ABOUT = """
Multi-query recall of 4, 8 or 16 pairs in rows of 64 tokens (`zoo show mqar`); other positions are 0. A model
is one short convolution, then one layer (of a hybrid two, or two side by side). Nothing else carries a state,
so the bytes of the state are those of the layers named, at 64 tokens, in float32.
"""
RULES = """
The learning rate is the best of three on validation, at a seed of its own. A seed has learned if its accuracy
is {learned} or more. Training ends at 99 % of the validation answers, or after 800 steps of 64 rows: what a
model had not learned then, it may learn from more rows. The published comparison (Arora et al., Zoology)
trains on 180,000 rows, 32 times over. Where several patterns solve the task, it does not rank them. The plot
leaves out patterns of which no seed learned.
"""


def compared(read: Read, width: int) -> Comparison | None:
    """The comparison at a width; None where nothing has ended."""
    stored = read[f"recall-state-{width}"]
    if stored.trials is None or not stored.results():
        return None
    baseline = BASELINE if stored.results({KEY: BASELINE}) else None
    return compare(stored.trials, [KEY], best=["train.lr"], baseline=baseline, learned=LEARNED)


def sections(read: Read) -> dict[str, list[str]]:
    return {f"Width {width}": _section(read, width) for width in WIDTHS}


def _section(read: Read, width: int) -> list[str]:
    comparison = compared(read, width)
    if comparison is None:
        return []
    picture = f"![Accuracy against bytes of the state at width {width}](recall_state-{width}.svg)"
    pairs = by_pairs(read, comparison, width)
    return [picture, "", *comparison_table(comparison), "", *gap_table(comparison), "", *pairs]


def by_pairs(read: Read, comparison: Comparison, width: int) -> list[str]:
    """Accuracy by the number of pairs, the mean over seeds, of what has learned."""
    trials = read[f"recall-state-{width}"].trials
    assert trials is not None
    rows, numbers = [], []
    for group in comparison.groups:
        if group.learning.none or not group.rows:
            continue
        each = by_slice(trials, group.rows, "n_pairs")
        numbers = list(each[0])
        rows.append([code(group.label), *(f"{fmean(one[n] for one in each):.3f}" for n in numbers)])
    if not rows:
        return []
    return ["Accuracy by the number of pairs, mean over seeds:", "", *table([KEY, *map(str, numbers)], rows)]


def short(label: str) -> str:
    """A label as a legend has room for."""
    for text, less in (("(n_heads=4)", ""), (", n_heads=4", ""), ("A_init_range=", "A ")):
        label = label.replace(text, less)
    return label


def pictures(read: Read) -> dict[str, str]:
    found = {}
    for width in WIDTHS:
        comparison = compared(read, width)
        if comparison is None:
            continue
        rows, series = [], []
        for i, group in enumerate(comparison.groups):
            state = group.middle("state_bytes")
            if group.estimate is None or group.learning.none or not state:
                continue
            rows.append(Row(f"g-{i}", short(group.label), i))
            mean, interval = group.estimate.mean, group.estimate.interval
            edges = ([], []) if interval is None else ([max(interval.low, 0.0)], [min(interval.high, 1.0)])
            series.append(Series(f"g-{i}", [state], [mean], *edges))
        x, y = Axis("state of one sequence", "size", log=True), Axis("test accuracy", "percent")
        chart = Chart(f"recall_state-{width}", "", "", [Panel("points", x, y, series, front=True)])
        found[chart.name] = svg(chart, rows)
    return found


STUDY = SweepStudy(
    "recall_state",
    __doc__,
    (
        Stored("recall-state-64", "zoo sweep recall-state model.d_model=64 --seeds 0,1,2,3,4"),
        Stored("recall-state-128", "zoo sweep recall-state model.d_model=128"),
    ),
    "Recall against the bytes of the state",
    (ABOUT, RULES.format(learned=LEARNED)),
    sections,
    pictures,
)

if __name__ == "__main__":
    STUDY.main()
