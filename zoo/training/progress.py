"""What a person sees of a training: a bar on a terminal, a line per evaluation elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.2


class Reporter:
    """Reports of one training, on standard error; use as a context manager."""

    def __init__(self, name: str, steps: int, metric: str, *, quiet: bool = False):
        self.name, self.steps, self.metric, self.quiet = name, steps, metric, quiet
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.score = ""
        self._last = 0.0

    def __enter__(self) -> Reporter:
        if self.console.is_terminal and not self.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            # Drawn from the training loop, now and then: a drawing thread would take its turns from the model.
            self.bar = Progress(
                *columns, TextColumn("{task.fields[figures]}"), console=self.console, auto_refresh=False
            )
            self.bar.start()
            self.row = self.bar.add_task(self.name, total=self.steps, figures="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def train(self, line: dict[str, Any]) -> None:
        """A training line of metrics.jsonl."""
        now = time.perf_counter()
        if self.bar is None or now - self._last < REFRESH_SECONDS:
            return
        self._last = now
        figures = f"loss {line['loss']:.3f} {self.score} {line['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.row, completed=line["step"], figures=figures, refresh=True)

    def evaluation(self, line: dict[str, Any], rate: float | None) -> None:
        """A validation line of metrics.jsonl."""
        self.score = _figure(line, self.metric)
        if self.bar is not None:
            self.bar.update(self.row, completed=line["step"], refresh=True)
            return
        width = len(str(self.steps))
        speed = "" if rate is None else f"  {rate:,.0f} tokens/s"
        names = dict.fromkeys(["loss", "accuracy", "exact", "mse", "mse_ratio", self.metric])
        figures = "  ".join(_figure(line, name) for name in names if name in line)
        self.say(f"{self.name}  step {line['step']:>{width}}/{self.steps}  {figures}{speed}  {line['seconds']:.1f} s")


def _figure(line: dict[str, Any], name: str) -> str:
    """A figure with its name; of errors, which may be small, four digits that count."""
    return f"{name} {line[name]:.4g}" if name == "mse" else f"{name} {line[name]:.3f}"
