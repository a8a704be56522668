"""The table of runs, declared once as columns: for terminals, Markdown, CSV, JSON and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from zoo.report import units
from zoo.report.labels import config_key, labels
from zoo.report.runs import Run, as_runs
from zoo.report.units import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A figure of every run.

    Attributes:
        key: its name for `Run.figure`, in JSON and CSV.
        title: its heading; a line break where a narrow table may break it.
        text: a value as people read it.
        best: which value is the best one, if any.
        help: what it says, in one sentence.
        instead_of: key of a better column; this one is shown only where that has no data.
        page: shown on the page only, where there is room.
        unless: a value that is not worth a column where every run has it.
    """

    key: str
    title: str
    text: Callable[[float], str]
    best: Literal["max", "min"] | None
    help: str
    instead_of: str = ""
    page: bool = False
    unless: float | None = None


COLUMNS = (
    Column("n_parameters", "params", units.count, "min", "Number of trained weights."),
    Column("accuracy", "accuracy", units.percent, "max", "Share of scored positions that are right."),
    Column("exact", "exact", units.percent, "max", "Share of examples with every position right."),
    Column("mse", "mse", units.plain, "min", "Mean squared error of the scored steps."),
    Column("mse_ratio", "share of\ntrivial", units.percent, "min", "The error as a share of the trivial predictor's."),
    Column(
        "bits_per_byte", "bits per\nbyte", units.plain, "min", "Loss in bits a byte; of an objective that bounds it: ≤."
    ),
    Column(
        "passes",
        "passes",
        units.count,
        "min",
        "Passes through the model for an answer: tokens said, unmaskings, steps of thinking.",
        unless=1,
    ),
    Column("seconds_to_target", "time to\ntarget", units.duration, "min", "Training time until the target was met."),
    Column("steps", "steps", units.count, None, "Optimizer steps.", instead_of="seconds_to_target"),
    Column("seconds", "trained\nfor", units.duration, None, "Training time.", page=True),
    Column("tokens_per_second", "train\ntok/s", units.count, "max", "Tokens a second in training."),
    Column("decode_tokens_per_second", "decode\ntok/s", units.count, "max", "Tokens a second, one after another."),
    Column("state_bytes", "state", units.size, "min", "Memory that one sequence carries at its full length."),
    Column("peak_memory_bytes", "peak\nmemory", units.size, "min", "Most memory in use while training."),
)


class Cell(NamedTuple):
    """A figure, its text, whether it is the best of its column, and what stands below it: its interval."""

    value: float | None
    text: str
    best: bool
    detail: str = ""


class Line(NamedTuple):
    """A run in the table."""

    run: Run
    label: str
    cells: list[Cell]


_MORE = (
    *("tokens", "context_length", "flops_per_token", "n_rows", "n_problems", "exact_low", "exact_high"),
    *("trivial_mse", "mse_low", "mse_high"),
)


def ordered(runs: Sequence[Run]) -> list[Run]:
    """The runs, most accurate first, then those of real vectors, the least error first; of equals the one that was
    sooner there."""

    def rank(run: Run) -> tuple[float, float, float, float]:
        figures = (run.figure(key) for key in ("mse", "seconds_to_target", "seconds"))
        error, first, second = (float("inf") if figure is None else figure for figure in figures)
        accuracy = run.figure("accuracy")
        return -1.0 if accuracy is None else -accuracy, error, first, second

    return sorted(runs, key=lambda run: (run.figure("accuracy") is None, *rank(run)))


def lines(runs: Sequence[Run], *, page: bool = False) -> tuple[list[Column], list[Line]]:
    """The columns that have data, and the runs in order with a cell for each."""
    runs = ordered(runs)
    with_data = {c.key for c in COLUMNS if any(run.figure(c.key) is not None for run in runs)}
    alike = {c.key for c in COLUMNS if c.unless and all(run.figure(c.key) in (None, c.unless) for run in runs)}
    columns = [
        c for c in COLUMNS if c.key in with_data - alike and c.instead_of not in with_data and (page or not c.page)
    ]
    by_column = [cells_of(column, [run.figure(column.key) for run in runs]) for column in columns]
    for column, cells in zip(columns, by_column, strict=True):
        if column.key == "bits_per_byte":
            bounds = zip(cells, runs, strict=True)
            cells[:] = [cell._replace(text=f"≤ {cell.text}") if run.is_bound else cell for cell, run in bounds]
        if column.key in ("exact", "mse"):
            cells[:] = [cell._replace(detail=interval(run, column.key)) for cell, run in zip(cells, runs, strict=True)]
    return columns, [
        Line(run, label, list(cells)) for run, label, *cells in zip(runs, labels(runs), *by_column, strict=True)
    ]


def cells_of(column: Column, values: Sequence[float | None]) -> list[Cell]:
    """The cells of a column, those marked that show its best figure."""
    texts = [units.MISSING if v is None else column.text(v) for v in values]
    known = [v for v in values if v is not None]
    best = None
    if column.best and len(set(known)) > 1:  # among equals there is no best
        best = column.text(max(known) if column.best == "max" else min(known))
    # Compared as shown: what looks equal is marked as equal.
    return [Cell(v, t, v is not None and t == best) for v, t in zip(values, texts, strict=True)]


def interval(run: Run, key: str = "exact") -> str:
    """The interval of the share of exact answers, or of `mse`, over the problems that differ; empty where unknown."""
    low, high = run.figure(f"{key}_low"), run.figure(f"{key}_high")
    if low is None or high is None:
        return ""
    if key == "mse":
        return f"{units.plain(low)} to {units.plain(high)}"
    return f"{100 * low:.1f} to {100 * high:.1f}"


def rows(runs: Sequence[Run | str | Path] | str | Path) -> list[dict[str, Any]]:
    """The table as plain data, for JSON and CSV: exact figures, None where a run has none.

    `group` is a number that runs share which differ in nothing but name, folder and seed.
    """
    runs = ordered(as_runs(runs))
    groups = {key: i for i, key in enumerate(dict.fromkeys(map(config_key, runs)))}
    return [
        {
            "name": label,
            "status": run.status,
            "pattern": run.pattern,
            "objective": run.section("objective").get("name"),
            "loss_is_bound": run.is_bound,
            "split": run.scores()[1],
            **{key: run.figure(key) for key in (*(c.key for c in COLUMNS), *_MORE)},
            "seed": run.seed,
            "group": groups[config_key(run)],
            "precision": run.result.get("precision"),
            "commit": run.result.get("commit"),
            "path": str(run.path),
        }
        for run, label in zip(runs, labels(runs), strict=True)
    ]


def table(runs: Sequence[Run | str | Path] | str | Path) -> Table:
    """The table for a terminal of 80 columns or more; the best figure of each column is bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    runs = as_runs(runs)
    columns, body = lines(runs)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False, caption=note(runs) or None)
    result.caption_justify = "left"
    result.add_column("model\nlayers", overflow="fold", min_width=12)
    for column in columns:
        result.add_column(column.title, justify="right", no_wrap=True, vertical="top")
    for line in body:
        name = Text(line.label)
        if line.run.ending:
            name.append(f" ({line.run.ending})", style="yellow")
        if line.run.pattern:  # below the name: beside it, the figures would not fit
            name.append("\n" + printable(line.run.pattern), style="dim")
        result.add_row(name, *map(_in_terminal, line.cells))
    return result


def _in_terminal(cell: Cell) -> Text:
    from rich.text import Text

    shown = Text(cell.text, style="bold green" if cell.best else "")
    return shown.append(f"\n{cell.detail}", style="not bold dim default") if cell.detail else shown


def markdown(runs: Sequence[Run | str | Path] | str | Path) -> str:
    """The table in GitHub's Markdown, the best figure of each column in bold."""
    runs = as_runs(runs)
    columns, body = lines(runs)
    head = ["model", "layers", *(c.title.replace("\n", " ") for c in columns)]
    text = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(columns)]
    for line in body:
        name = _markdown(line.label) + (f" ({_markdown(line.run.ending)})" if line.run.ending else "")
        pattern = printable(line.run.pattern).replace("`", "'").replace("|", r"\|")
        figures = [(f"**{c.text}**" if c.best else c.text) + (f" ({c.detail})" if c.detail else "") for c in line.cells]
        text.append("| " + " | ".join([name, f"`{pattern}`" if pattern else "", *figures]) + " |")
    if remark := note(runs):
        text += ["", _markdown(remark)]
    return "\n".join(text) + "\n"


def to_csv(runs: Sequence[Run | str | Path] | str | Path) -> str:
    """`rows` as CSV with a heading."""
    return "".join(csv_lines(runs))


def csv_lines(runs: Sequence[Run | str | Path] | str | Path) -> list[str]:
    """The heading of the CSV and what is written of each run, which has line ends in it where a name has."""
    data = rows(runs)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(data[0]) if data else ["name"], lineterminator="\r\n")
    written = []
    for row in (None, *data):
        if row is None:
            writer.writeheader()
        else:
            writer.writerow(row)
        written.append(out.getvalue())
        out.seek(0)
        out.truncate()
    return written


def note(runs: Sequence[Run]) -> str:
    """What the figures of the table are of, in a line; empty where nothing is known."""
    splits = sorted({split for run in runs if (split := run.scores()[1])})
    contexts = sorted({int(c) for run in runs if (c := run.figure("context_length")) is not None})
    parts = []
    if splits:
        kinds = {"accuracy and exact": "accuracy", "errors (mse)": "mse"}
        named = [name for name, key in kinds.items() if any(run.figure(key) is not None for run in runs)]
        parts.append(f"{' and '.join(named)} on {' or '.join(splits)} examples{_rows_and_problems(runs)}")
    if any(map(interval, runs)):
        parts.append("with exact, its 95% interval over the problems that differ, in percent")
    if any(interval(run, "mse") for run in runs):
        parts.append("with mse, its 95% interval over the problems that differ")
    if contexts and any(run.figure("state_bytes") is not None for run in runs):
        parts.append(f"state of one sequence at {' or '.join(map(str, contexts))} tokens")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def _rows_and_problems(runs: Sequence[Run]) -> str:
    """How many rows were scored, and of how many problems up to the task's own symmetry; empty where unknown."""
    counted = dict.fromkeys((run.figure("n_rows"), run.figure("n_problems")) for run in runs)
    told = [f"{n:,.0f} rows, {m:,.0f} problems" for n, m in counted if n is not None and m is not None]
    return f" ({' or '.join(told)} up to the task's symmetry)" if told else ""


def _markdown(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + c if c in r"\`*_{}[]|#~$" else c for c in text)
