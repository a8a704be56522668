"""What a comparison is made of: runs, sweeps, and measurements of `zoo bench`, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from zoo.core.errors import UsageError
from zoo.core.readers import check_path
from zoo.core.run_files import is_run
from zoo.report.records import Record, load_records
from zoo.report.runs import DEPTH, EXPECTED, Run, Say, load_runs, subfolders, tolerant
from zoo.report.trials.compare import Comparison, Question, compare
from zoo.report.trials.source import Trials, from_runs, from_sweep, together
from zoo.sweeps.sql import Answer, query
from zoo.sweeps.store import is_sweep

RECORDS = ".jsonl"


class Found(NamedTuple):
    """What lies at some paths: run folders, measurements of `zoo bench`, and sweeps."""

    runs: list[Run]
    measurements: list[Record]
    sweeps: list[Trials]

    def compared(self, question: Question | None) -> Comparison | None:
        """All sweeps as one comparison, with the ordinary runs if there is a question; None where nothing is left.

        Raises:
            UsageError: what `compare` refuses; a question and nothing to compare.
        """
        if question is not None:
            return compare(self._trials(), **question._asdict())
        return compare(together(self.sweeps)) if self.sweeps else None

    def each_sweep(self, say: Say) -> list[Comparison]:
        """A comparison for each sweep; `say` hears of those that have none."""
        found = []
        for trials in self.sweeps:
            try:
                found.append(compare(trials))
            except UsageError as error:
                say(f"Left out: {error}")
        return found

    def ask(self, sql: str) -> Answer:
        """The answer to a question in SQL about all trials, those of sweeps and ordinary runs.

        Raises:
            UsageError: what `zoo.sweeps.sql.query` refuses.
        """
        return query(self._trials().frames, sql)

    def _trials(self) -> Trials:
        """The trials of sweeps, and ordinary runs as trials."""
        parts = [*self.sweeps, *([from_runs(self.runs)] if self.runs else [])]
        if not parts:
            raise UsageError(f"There are no trials here: {EXPECTED}, or a sweep.")
        return together(parts)


def gather(paths: Sequence[str | Path], say: Say) -> Found:
    """The runs, measurements and sweeps at `paths`, each once. The trials of a sweep are no runs of their own.

    Args:
        paths: run folders, sweeps, files of `zoo bench`, or folders of these (up to `DEPTH` levels down).
        say: called with a line for each file that is damaged or belongs to another program; it is skipped.

    Raises:
        UsageError: nothing given, nothing there, or nothing left.
    """
    files: dict[Path, Path] = {}
    sweeps: dict[Path, Path] = {}
    folders: list[Path] = []
    for path in map(check_path, paths):
        if path.is_file() and path.suffix == RECORDS and not is_run(path.parent):
            files.setdefault(path.resolve(), path)
            continue
        found = list(_record_files(path, DEPTH)) if path.is_dir() else []
        files.update({file.resolve(): file for file in found})
        below = list(_sweeps(path, DEPTH)) if path.is_dir() else []
        sweeps.update({folder.resolve(): folder for folder in below})
        if not (found or below) or _holds_run(path, DEPTH):
            folders.append(path)
    runs = load_runs(folders, say, aside=is_sweep) if folders or not (files or sweeps) else []
    trials = [one for path in sweeps.values() if (one := tolerant(from_sweep, path, say)) is not None]
    # One by one: a damaged file does not take the others with it.
    whole = [file for file in files.values() if tolerant(lambda f: load_records([f]), file, say) is not None]
    measurements = load_records(whole)
    if not runs and not measurements and not trials:
        raise UsageError(f"Nothing is left to compare: {EXPECTED}, a sweep, or a file of `zoo bench`.")
    return Found(runs, measurements, trials)


def _sweeps(folder: Path, depth: int) -> Iterator[Path]:
    """Folders of sweeps in a folder and below."""
    if is_sweep(folder):
        yield folder
    elif depth and not is_run(folder):
        for child in subfolders(folder):
            yield from _sweeps(child, depth - 1)


def _record_files(folder: Path, depth: int) -> Iterator[Path]:
    """Files of `zoo bench` in `folder` and below, as their first line tells."""
    if is_run(folder) or is_sweep(folder):
        return
    yield from (file for file in sorted(folder.glob(f"*{RECORDS}")) if _is_record_file(file))
    if depth:
        for child in subfolders(folder):
            yield from _record_files(child, depth - 1)


def _is_record_file(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"benchmark", "setting"} <= first.keys()


def _holds_run(folder: Path, depth: int) -> bool:
    if is_sweep(folder):
        return False
    return is_run(folder) or (depth > 0 and any(_holds_run(child, depth - 1) for child in subfolders(folder)))
