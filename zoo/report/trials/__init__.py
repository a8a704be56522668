"""Trials of sweeps, or ordinary runs, compared by what they differ in: means, intervals and paired differences."""

from zoo.report.trials.compare import Comparison, Question, compare
from zoo.report.trials.source import Trials, from_runs, from_sweep, together

__all__ = ["Comparison", "Question", "Trials", "compare", "from_runs", "from_sweep", "together"]
