"""Runs, sweeps and measurements compared: a table, plots and a page.

    runs = load_runs(["runs/demo"])
    rich.print(table(runs))
    write_report(runs, "runs/demo/report.html")
    save_plots(runs, "pictures")

`save_plots`, `table`, `markdown`, `rows`, `to_csv` and `write_report` take run folders too, in place of runs. Figures
are those of `result.json`, whose keys name them here too. Plotting and templating libraries are imported when they are
used, not before.
"""

from zoo.report.leaderboard import markdown, rows, table, to_csv
from zoo.report.page import write_report
from zoo.report.pareto import pareto_front
from zoo.report.plots import PLOTS
from zoo.report.records import Record, load_records
from zoo.report.runs import Run, load_runs
from zoo.report.sources import gather
from zoo.report.static import save_plots
from zoo.report.words import caveats, repeats, spreads

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
