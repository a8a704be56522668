"""Runs, sweeps and measurements compared: a table, plots and a page.

    runs = load_runs(["runs/demo"])
    rich.print(table(runs))
    write_report(runs, "runs/demo/report.html")
    save_plots(runs, "pictures")

`save_plots`, `table`, `markdown`, `rows`, `to_csv` and `write_report` take run folders too, in place of runs. Figures
are those of `result.json`, whose keys name them here too. Plotting and templating libraries are imported when they are
used, not before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.report.leaderboard import markdown, rows, table, to_csv
    from zoo.report.page import write_report
    from zoo.report.pareto import pareto_front
    from zoo.report.plots import PLOTS
    from zoo.report.records import Record, load_records
    from zoo.report.runs import Run, load_runs
    from zoo.report.sources import gather
    from zoo.report.static import save_plots
    from zoo.report.words import caveats, repeats, spreads

# Imported when they are first used: the records of a benchmark need no statistics and no tables of trials.
_LATER = {
    **dict.fromkeys(("markdown", "rows", "table", "to_csv"), "leaderboard"),
    "write_report": "page",
    "pareto_front": "pareto",
    "PLOTS": "plots",
    **dict.fromkeys(("Record", "load_records"), "records"),
    **dict.fromkeys(("Run", "load_runs"), "runs"),
    "gather": "sources",
    "save_plots": "static",
    **dict.fromkeys(("caveats", "repeats", "spreads"), "words"),
}

__all__ = [
    "PLOTS",
    "Record",
    "Run",
    "caveats",
    "gather",
    "load_records",
    "load_runs",
    "markdown",
    "pareto_front",
    "repeats",
    "rows",
    "save_plots",
    "spreads",
    "table",
    "to_csv",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
