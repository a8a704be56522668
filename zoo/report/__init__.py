"""Runs compared: a table, plots and a page.

    runs = load_runs(["runs/demo"])
    rich.print(table(runs))
    write_report(runs, "runs/demo/report.html")

Figures are those of `result.json`, whose keys name them here too. Plotting and templating libraries are imported when
they are used, not before.
"""

from zoo.report.leaderboard import markdown, rows, table, to_csv
from zoo.report.page import write_report
from zoo.report.pareto import pareto_front
from zoo.report.plots import PLOTS, save_plots
from zoo.report.runs import Run, load_runs

__all__ = [
    "PLOTS",
    "Run",
    "load_runs",
    "markdown",
    "pareto_front",
    "rows",
    "save_plots",
    "table",
    "to_csv",
    "write_report",
]
