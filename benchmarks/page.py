"""The page of a benchmark: its records as Markdown, with pictures beside it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.benchmarks.tables import notes
from zoo.core.errors import UsageError, quoted
from zoo.core.files import write_atomic
from zoo.report import bench, static
from zoo.report.benchmark import Benchmark, Plot, Table
from zoo.report.charts import Chart
from zoo.report.records import Record


def tables(benchmark: type[Benchmark], found: Sequence[Record]) -> list[Table]:
    """The tables of a benchmark.

    Raises:
        UsageError: it makes something else.
    """
    made = benchmark.tables(found)
    if not (isinstance(made, list) and all(isinstance(table, Table) for table in made)):
        raise UsageError(f"tables of the benchmark {benchmark.label()!r} returns {quoted(made, 60)}, no list of Table.")
    return made


def write(benchmark: type[Benchmark], found: Sequence[Record], data: Path, folder: Path) -> None:
    """Write the page and its pictures.

    Args:
        benchmark: of the records.
        found: what the page shows.
        data: the file of the records, which the page links to.
        folder: where to.

    Raises:
        RunError: the file system refuses.
    """
    rows = bench.rows_of(found)
    charts = bench.charts_of(benchmark, found, rows)
    for chart in charts:
        write_atomic(folder / picture_of(benchmark, chart), static.svg(chart, rows).encode())
    for plot in benchmark.plots:
        if plot.name not in [chart.name for chart in charts]:
            (folder / picture_of(benchmark, plot)).unlink(missing_ok=True)  # of figures that are no longer there
    link = os.path.relpath(data, folder).replace(os.sep, "/")
    write_atomic(folder / f"{benchmark.label()}.md", markdown(benchmark, found, link, charts).encode())


def picture_of(benchmark: type[Benchmark], drawn: Chart | Plot) -> str:
    """The name of a picture's file."""
    name, label = drawn.name.removeprefix("bench-"), benchmark.label()
    return f"{label}.svg" if name == label else f"{label}-{name}.svg"


def markdown(benchmark: type[Benchmark], found: Sequence[Record], link: str, charts: Sequence[Chart]) -> str:
    """The page: how it was measured, the pictures, the tables.

    Args:
        benchmark: of the records.
        found: what the page shows.
        link: to the file of the records.
        charts: of which there are pictures beside the page.
    """
    about = inspect.cleandoc(benchmark.__doc__ or "")
    places = dict.fromkeys(map(_place, found))
    lines = [f"# {benchmark.title}", "", about, ""]
    lines += [values(found), f"Forms of the ops and versions are in [{Path(link).name}]({link}).", ""]
    places |= dict.fromkeys(told for r in found if (told := conditions(r)))
    lines += [*(f"- {place}" for place in places), ""]
    for chart in charts:
        lines += [f"![{chart.title}]({picture_of(benchmark, chart)})", "", chart.caption, ""]
    for table in tables(benchmark, found):
        lines += [f"## {table.title}", "", _markdown_row(table.head)]
        lines += ["|---|" + "---:|" * (len(table.head) - 1), *map(_markdown_row, table.rows), ""]
    lines += [f"- {line}" for line in notes(found)]
    return "\n".join(lines).rstrip() + "\n"


def _place(r: Record) -> str:
    """Where and when a record was measured, as a line of the page."""
    threads = f"{r.threads} thread{'s' if r.threads > 1 else ''}"
    torch_and_commit = f"torch {r.versions['torch']}, commit {(r.commit or 'unknown')[:12]}"
    at = f"{r.machine['cpu']}, {r.machine['cpus']} cores, {threads}, {r.device}, {r.precision}"
    return f"{at}, {torch_and_commit}, {r.date[:10]}"


def values(found: Sequence[Record]) -> str:
    """Of how many values the figures are, in a sentence or two."""
    counts: dict[str, set[int]] = {}
    for r in found:
        for name, figure in r.figures.items():
            counts.setdefault(name, set()).add(figure.get("n", 1))

    def named(names: Sequence[str]) -> str:
        return ", ".join(name.replace("_", " ") for name in names)

    several = [name for name, n in counts.items() if max(n) > 1]
    single = [name for name, n in counts.items() if max(n) == 1]
    told = []
    if several:
        n = set().union(*(counts[name] for name in several))
        how_many = f"{min(n)} to {max(n)}" if len(n) > 1 else f"{max(n)}"
        told.append(f"Medians of {how_many} values ({named(several)}); their number and quartiles are in the records.")
    if single:
        told.append(f"One value each (n = 1), without a spread: {named(single)}.")
    return " ".join(told) or "No figures."


def conditions(r: Record) -> str:
    """What else was requested, as a line of the page; empty where the record does not say."""

    def text(value: Any) -> str:
        return (
            ", ".join(map(text, value))
            if isinstance(value, list)
            else f"{value:g}"
            if _is_number(value)
            else f"{value}"
        )

    told = [f"{key.removeprefix('train.').replace('_', ' ')} {text(value)}" for key, value in r.conditions.items()]
    if "budget" in r.conditions:
        told[list(r.conditions).index("budget")] += " s"
    return "; ".join(told)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
