"""What a person sees of a sweep: a table on a terminal, a line for each trial elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zoo.sweeps.plan import Trial
from zoo.sweeps.trial import DONE, Job
from zoo.tasks.scores import LOWER_IS_BETTER

REFRESH_SECONDS = 0.5
MOST_LINES = 12


class View:
    """The progress of a sweep, on standard error; use as a context manager.

    Args:
        name: of the sweep.
        metric: the validation figure that is shown.
        quiet: show nothing.
    """

    def __init__(self, name: str, metric: str, *, quiet: bool = False):
        self.name, self.metric, self.quiet = name, metric, quiet
        self.console = Console(stderr=True, highlight=False)
        self.live: Live | None = None
        self._last, self._start = 0.0, time.perf_counter()
        self._ended, self._total = 0, 0

    def __enter__(self) -> View:
        if self.console.is_terminal and not self.quiet:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line, above the table where there is one."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def ended(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """A trial has ended in some way."""
        self._ended += 1
        if self.live is None or row["status"] == "failed":
            figure = row.get(f"validation.{self.metric}") if row["status"] != "failed" else None
            told = f"{self.metric} {figure:.3f}" if isinstance(figure, int | float) else row.get("reason") or ""
            took = f", {row['seconds']:.1f} s" if row.get("seconds") is not None else ""
            self.say(f"{trial.id}  {row['status']}  {trial.told()}  {told}{took}")

    def show(
        self,
        rows: Mapping[int, Mapping[str, Any]],
        running: Mapping[int, Job],
        records: Mapping[int, Mapping[str, Any]],
        total: int,
    ) -> None:
        """Draw the table, now and then.

        Args:
            rows: what is stored of each trial.
            running: the trials that run.
            records: their newest validation records.
            total: number of trials of the sweep.
        """
        now = time.perf_counter()
        if self.live is None or now - self._last < REFRESH_SECONDS:
            return
        self._last = now
        self.live.update(self.table(rows, running, records, total), refresh=True)

    def table(
        self,
        rows: Mapping[int, Mapping[str, Any]],
        running: Mapping[int, Job],
        records: Mapping[int, Mapping[str, Any]],
        total: int,
    ) -> Group:
        """The best trial so far, and those that run; see `show`."""
        over = [row for index, row in rows.items() if row["status"] in (*DONE, "failed") and index not in running]
        counts = {status: sum(row["status"] == status for row in over) for status in ("pruned", "failed")}
        told = [f"{len(over)}/{total} trials", f"{len(running)} running"]
        told += [f"{n} {status}" for status, n in counts.items() if n]
        if self._ended and len(over) < total:
            left = (time.perf_counter() - self._start) / self._ended * (total - len(over))
            told.append(f"about {_duration(left)} left")
        lines = Table(box=None, pad_edge=False)
        for column in ("trial", "status", "step", self.metric, "options"):
            lines.add_column(column, no_wrap=True, overflow="ellipsis")
        best = self.best(over)
        if best is not None:
            value = f"{best[f'validation.{self.metric}']:.3f}"
            lines.add_row(best["id"], "best so far", str(best["steps"]), value, _options(best))
        for index, job in list(running.items())[:MOST_LINES]:
            record = records.get(index, {})
            figure = f"{record[self.metric]:.3f}" if self.metric in record else ""
            lines.add_row(job.trial.id, "running", str(record.get("step", "")), figure, job.trial.told())
        return Group(Text(f"{self.name}: {', '.join(told)}"), lines)

    def best(self, rows: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The row with the best validation figure, if one has any."""
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        known = [row for row in rows if isinstance(row.get(f"validation.{self.metric}"), int | float)]
        known = [row for row in known if math.isfinite(row[f"validation.{self.metric}"]) and row["status"] != "failed"]
        return max(known, key=lambda row: sign * row[f"validation.{self.metric}"], default=None)


def _options(row: Mapping[str, Any]) -> str:
    return " ".join(f"{k.removeprefix('set.')}={v}" for k, v in row.items() if k.startswith("set.") and v is not None)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


__all__ = ["View"]
