"""What a comparison is made of: runs, and measurements of `zoo bench`, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from zoo.core.errors import UsageError
from zoo.core.readers import check_path
from zoo.core.run_files import is_run
from zoo.report.records import Record, load_records
from zoo.report.runs import DEPTH, EXPECTED, Run, Told, load_runs, subfolders, tolerant

RECORDS = ".jsonl"


def gather(paths: Sequence[str | Path], told: Told) -> tuple[list[Run], list[Record]]:
    """The runs and measurements at `paths`, each once.

    Args:
        paths: run folders, files of `zoo bench`, or folders of either (up to `DEPTH` levels down).
        told: called with a line for each file that is damaged or belongs to another program; it is skipped.

    Raises:
        UsageError: nothing given, nothing there, or nothing left.
    """
    files: dict[Path, Path] = {}
    folders: list[Path] = []
    for path in map(check_path, paths):
        if path.is_file() and path.suffix == RECORDS and not is_run(path.parent):
            files.setdefault(path.resolve(), path)
            continue
        found = list(_record_files(path, DEPTH)) if path.is_dir() else []
        files.update({file.resolve(): file for file in found})
        if not found or _holds_run(path, DEPTH):
            folders.append(path)
    runs = load_runs(folders, told) if folders or not files else []
    # One by one: a damaged file does not take the others with it.
    whole = [file for file in files.values() if tolerant(lambda f: load_records([f]), file, told) is not None]
    measurements = load_records(whole)
    if not runs and not measurements:
        raise UsageError(f"Nothing is left to compare: {EXPECTED}, or a file of `zoo bench`.")
    return runs, measurements


def _record_files(folder: Path, depth: int) -> Iterator[Path]:
    """Files of `zoo bench` in `folder` and below, as their first line tells."""
    if is_run(folder):
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
    return is_run(folder) or (depth > 0 and any(_holds_run(child, depth - 1) for child in subfolders(folder)))
