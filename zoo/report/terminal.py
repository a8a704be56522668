"""Comparisons as the terminal shows them: tables on standard output, what to keep in mind on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from zoo.report import words
from zoo.report.leaderboard import rows, table
from zoo.report.records import Record
from zoo.report.runs import Run
from zoo.report.trials import board
from zoo.report.trials import words as trial_words
from zoo.report.trials.compare import Comparison
from zoo.report.units import printable
from zoo.sweeps.sql import Answer

_MOST = 200
"""Rows of an answer that are printed."""


def print_runs_and_trials(
    runs: Sequence[Run],
    comparison: Comparison | None,
    measurements: Sequence[Record],
    *,
    as_json: bool,
    note: Callable[[str], object],
) -> None:
    """Print the table of runs, and that of trials.

    Args:
        runs: ordinary runs.
        comparison: of trials, None without any.
        measurements: of `zoo bench`.
        as_json: a list of runs; with a comparison an object that holds the groups, the differences and the runs.
        note: hears what to keep in mind.
    """
    if as_json:
        plain: Any = rows(runs)
        if comparison is not None:
            plain = {**board.data(comparison), **({"runs": plain} if runs else {})}
        print(json.dumps(plain, indent=1))
    else:
        if runs:
            _console().print(table(runs))
            for line in words.spreads(runs):
                print(f"{line}.")
        if comparison is not None:
            _print_comparison(comparison)
    once = words.repeats(runs)
    for line in (*words.caveats(runs, measurements), *([f"{once}."] if once else [])):
        note(line)
    for line in trial_words.caveats(comparison) if comparison is not None else ():
        note(line)


def print_answer(answer: Answer, *, as_json: bool) -> None:
    """Print the answer to a question in SQL; as JSON all of it, a list with an object a row."""
    if as_json:
        named = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        print(json.dumps(named, indent=1, default=str))
        return
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in answer.columns:
        result.add_column(printable(name).replace("[", "\\["), overflow="fold")
    for row in answer.rows[:_MOST]:
        result.add_row(*(_text(value).replace("[", "\\[") for value in row))
    _console().print(result)
    if len(answer.rows) > _MOST:
        print(f"{_MOST} of {len(answer.rows):,} rows; --json prints all.")


def _print_comparison(comparison: Comparison) -> None:
    console = _console()
    print(trial_words.summary(comparison))
    print()
    console.print(board.table(comparison))
    print()
    for line in trial_words.notes(comparison):
        print(f"{line}.")
    if comparison.gaps:
        print(f"\n{board.gap_title(comparison)}\n")
        console.print(board.gap_table(comparison))


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else printable(value)
