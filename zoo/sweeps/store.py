"""The results of a sweep as three tables in Parquet: its trials, their curves, and their scores of every test row.

SWEEP/store/trials.parquet      a row for each trial: config, end, figures, machine
SWEEP/store/curves.parquet      a row for each line of a trial's metrics.jsonl (split: train or validation)
SWEEP/store/problems.parquet    a row for each test row of a trial

While a sweep runs, what is added lies in numbered files beside these, `trials-00000012.parquet`. All of a trial that an
older file holds is void once a newer file of the same table holds that trial.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from zoo.core import yaml_text
from zoo.core.errors import UsageError
from zoo.core.files import write_atomic, writing
from zoo.core.readers import regular, shown, unreadable
from zoo.sweeps.defaults import with_defaults

SWEEP, STORE = "sweep.yaml", "store"
MOST_FILES = 64
"""Numbered files of a table, before they become one."""
MOST_ROWS = 2**28

_TEXT, _WHOLE, _REAL = pl.String, pl.Int64, pl.Float64
COLUMNS: dict[str, dict[str, Any]] = {
    "trials": {
        "trial": _WHOLE,
        "id": _TEXT,
        "stage": _TEXT,
        "status": _TEXT,
        "reason": _TEXT,
        "attempts": _WHOLE,
        "seed": _WHOLE,
        "steps": _WHOLE,
        "seconds": _REAL,
        "parameters": _WHOLE,
        "state_bytes": _WHOLE,
        "flops_per_token": _WHOLE,
        "peak_memory": _WHOLE,
        "tokens_per_second": _REAL,
        "chance": _REAL,
        "started": _TEXT,
        "ended": _TEXT,
        "zoo_version": _TEXT,
    },
    "curves": {"trial": _WHOLE, "step": _WHOLE, "split": _TEXT, "seconds": _REAL, "tokens": _WHOLE},
    "problems": {"trial": _WHOLE, "row": _WHOLE, "problem": _WHOLE, "accuracy": _REAL, "exact": _REAL},
}
"""The columns that each table has at least, by table."""


class Record(NamedTuple):
    """What is stored of one trial.

    Attributes:
        row: its row of `trials`, at least with the key `trial`.
        curves: its rows of `curves`, without the key `trial`.
        problems: its columns of `problems`, all of one length, without `trial`; None where it read no test row.
    """

    row: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]] = ()
    problems: Mapping[str, Sequence[Any]] | None = None


class Store:
    """The tables of one sweep. Many may read at once, while one process adds.

    Args:
        folder: the folder of the sweep.
    """

    def __init__(self, folder: str | Path):
        self.sweep = Path(folder)
        self.folder = self.sweep / STORE

    def trials(self) -> pl.DataFrame:
        """A row for each trial, in their order. Trials of an earlier version have the defaults of later options.

        Raises:
            UsageError: a file that is damaged, or that no sweep has written.
        """
        return with_defaults(self._read("trials").sort("trial"))

    def curves(self) -> pl.DataFrame:
        """A row for each training report and each evaluation of a trial.

        Raises:
            UsageError: as `trials`.
        """
        return self._read("curves").sort("trial", "step", maintain_order=True)

    def problems(self) -> pl.DataFrame:
        """A row for each test row of a trial.

        Raises:
            UsageError: as `trials`.
        """
        return self._read("problems").sort("trial", "row")

    def add(self, record: Record) -> None:
        """Write what is known of a trial; it takes the place of all that was known of the trial before.

        Raises:
            RunError: the file system refuses.
        """
        trial = record.row["trial"]
        tables = {"trials": table([record.row], COLUMNS["trials"])}
        if record.curves:
            tables["curves"] = table([{"trial": trial, **line} for line in record.curves], COLUMNS["curves"])
        if record.problems is not None:
            scores = pl.DataFrame(dict(record.problems))
            tables["problems"] = joined([scores.with_columns(trial=pl.lit(trial, _WHOLE))], COLUMNS["problems"])
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for name in reversed(tables):  # the trial's row last: where it is, all is
            numbers = [_number(path) for path in self._files(name)]
            self._write(self.folder / f"{name}-{max(numbers, default=-1) + 1:08d}.parquet", tables[name])
            if len(numbers) >= MOST_FILES:
                self.compact(name)

    def compact(self, *names: str) -> None:
        """Make one file of a table's files, of all tables by default.

        Raises:
            UsageError: as `trials`.
            RunError: the file system refuses.
        """
        for name in names or COLUMNS:
            files = self._files(name)
            if files and files != [self.folder / f"{name}.parquet"]:
                self._write(self.folder / f"{name}.parquet", self._read(name))
                with writing(self.folder):
                    for path in files:  # the oldest first: what a crash leaves is the newest
                        if _number(path) >= 0:
                            path.unlink()

    def _write(self, path: Path, rows: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        rows.write_parquet(buffer)
        write_atomic(path, buffer.getvalue())

    def _files(self, name: str) -> list[Path]:
        """The files of a table, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if re.fullmatch(rf"{name}(-\d{{8}})?\.parquet", path.name)]
        return sorted(found, key=_number)

    def _read(self, name: str) -> pl.DataFrame:
        if not self.folder.is_dir():
            raise UsageError(f"{shown(self.sweep)} is no sweep: it has no folder {STORE!r}.")
        parts: list[pl.DataFrame] = []
        newer: set[int] = set()
        for path in reversed(self._files(name)):
            try:
                part = _read_file(path, COLUMNS[name])
            except FileNotFoundError:  # made one with others meanwhile
                return self._read(name)
            parts.append(part.filter(~pl.col("trial").is_in(list(newer))))
            newer |= set(part["trial"].to_list())
        return joined(parts[::-1], COLUMNS[name])


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's, by what is in it."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> dict[str, Any]:
    """What sweep.yaml of a sweep's folder holds.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = folder / SWEEP
    if not path.is_file():
        raise UsageError(f"{shown(folder)} is no sweep: it has no {SWEEP}.")
    data = yaml_text.read(path)
    if not isinstance(data, dict) or not isinstance(data.get("experiment"), dict):
        raise UsageError(f"{shown(path)} is damaged, or no sweep's: it should be a mapping with the key experiment.")
    return data


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> pl.DataFrame:
    """Rows of plain values as a table; a column of values of several kinds, or of lists, becomes JSON text."""
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    series = []
    for name in names:
        values = [row.get(name) for row in rows]
        kind = columns.get(name) or _kind(values)
        if kind == _TEXT:
            values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        series.append(pl.Series(name, values, dtype=kind, strict=False))
    return pl.DataFrame(series)


def joined(parts: Sequence[pl.DataFrame], columns: Mapping[str, Any]) -> pl.DataFrame:
    """Tables below each other: with the columns of all, each of the narrowest type that holds its values."""
    empty = pl.DataFrame(schema=dict(columns))
    whole = pl.concat([empty, *parts], how="diagonal_relaxed")
    return whole.with_columns(pl.col(name).cast(kind, strict=False) for name, kind in columns.items())


def _kind(values: Sequence[Any]) -> Any:
    kinds = {type(v) for v in values if v is not None}
    if not kinds:
        return pl.Null
    if kinds == {bool}:
        return pl.Boolean
    if kinds == {int}:
        return _WHOLE if all(-(2**63) <= v < 2**63 for v in values if v is not None) else _REAL
    return _REAL if kinds <= {int, float} else _TEXT


def _number(path: Path) -> int:
    """Of a numbered file, its number; -1 of the file that others became, which is older."""
    _, _, digits = path.stem.partition("-")
    return int(digits) if digits else -1


def _read_file(path: Path, columns: Mapping[str, Any]) -> pl.DataFrame:
    """One file of a table.

    Raises:
        FileNotFoundError: it is gone.
        UsageError: it is damaged, or another kind of file.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        rows = pl.scan_parquet(regular(path), glob=False)
        known = rows.collect_schema()
        count = rows.select(pl.len()).collect().item()
        missing = [name for name in columns if name not in known]
        if missing or not known["trial"].is_integer() or count > MOST_ROWS:
            why = f"it lacks {', '.join(missing)}" if missing else f"{count:,} rows of trials {known['trial']}"
            raise UsageError(f"{shown(path)} is no table of a sweep: {why}.")
        return rows.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        if not path.exists():
            raise FileNotFoundError(path) from None
        raise unreadable(path, error) from None


__all__ = ["COLUMNS", "SWEEP", "Record", "Store", "is_sweep", "joined", "read_sweep", "table"]
