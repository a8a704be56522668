"""A comparison of trials as a section of the report page."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.report.charts import Chart, Row
from zoo.report.leaderboard import Cell
from zoo.report.trials import board, charts, words
from zoo.report.trials.compare import Comparison
from zoo.report.units import printable


@dataclass(frozen=True)
class Section:
    """What the page shows of a comparison; plain texts, which the template escapes.

    Attributes:
        id: of the section, plain enough for an attribute.
        title, heading, summary: of the page, of the section, and in a sentence or two.
        notes, caveats: what the figures are, and what to keep in mind.
        by: head of the column of groups.
        columns, lines, rows: the table, and the look of each line.
        csv: the table with exact figures.
        gap_title, gap_note, gap_columns, gaps: the differences to the baseline: id, name and texts of each.
        charts: the plots.
        sources: name, folder and text of each sweep's file.
        machines: of how many trials each set of machine and software is.
    """

    id: str
    title: str
    heading: str
    summary: str
    notes: list[str]
    caveats: list[str]
    by: str
    columns: list[board.Column]
    lines: list[list[Cell]]
    rows: list[Row]
    csv: str
    gap_title: str
    gap_note: str
    gap_columns: list[tuple[str, str]]
    gaps: list[tuple[str, str, list[str]]]
    charts: list[Chart]
    sources: list[tuple[str, str, str]]
    machines: list[tuple[str, dict[str, Any]]]


def of(comparison: Comparison, name: str) -> Section:
    """The section of a comparison, whose ids begin with `name`."""
    rows = charts.rows_of(comparison, name)
    columns, lines = board.lines(comparison)
    ids = {id(group): row for group, row in zip(comparison.groups, rows, strict=True)}
    trials = comparison.trials
    n = len(comparison.gaps)
    return Section(
        name,
        f"{printable(trials.name)}: {len(comparison.groups)} groups of {len(trials.rows)} trials",
        f"Trials of {printable(trials.name)}",
        words.summary(comparison),
        words.notes(comparison),
        words.caveats(comparison),
        "\n".join(comparison.by) or "group",
        columns,
        lines,
        rows,
        board.to_csv(comparison),
        board.gap_title(comparison),
        "Intervals hold all differences of the table at once with 95% (Bonferroni); p values are corrected by Holm."
        if n > 1
        else "",
        list(board.GAP_COLUMNS),
        [(ids[id(gap.group)].id, gap.group.label, board.gap_cells(comparison, gap)) for gap in comparison.gaps],
        charts.charts(comparison, rows),
        [
            ("sweep.yaml", printable(Path(folder)), printable_lines(text))
            for folder, text in (trials.sources or {}).items()
        ],
        _machines(comparison),
    )


def printable_lines(text: str) -> str:
    """A text without control characters but for the ends of its lines."""
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in text.splitlines())


def _machines(comparison: Comparison) -> list[tuple[str, dict[str, Any]]]:
    counted: Counter[str] = Counter()
    for row in comparison.trials.rows:
        machine = {k.removeprefix("machine."): v for k, v in row.items() if k.startswith("machine.") and v is not None}
        version = row.get("zoo_version")
        facts = {"machine": machine, **({"versions": {"sequence-zoo": version}} if version else {})}
        counted[json.dumps(facts, default=str)] += 1
    return [(f"{n} trial{'' if n == 1 else 's'}", json.loads(text)) for text, n in counted.items()]
