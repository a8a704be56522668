"""Questions in SQL to the tables of sweeps: DuckDB in memory, which reads the tables and nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from zoo.core.errors import UsageError, quoted

MEMORY, THREADS = "1GB", 2
_BEFORE: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": MEMORY,
    "threads": str(THREADS),
    "temp_directory": "",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
_AFTER = ("SET enable_external_access = false", "SET lock_configuration = true")


class Answer(NamedTuple):
    """The columns and rows of an answer."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


def query(tables: Mapping[str, pl.DataFrame], text: str) -> Answer:
    """The answer to one SELECT over tables, by their names.

    The database is in memory and holds copies of the tables. It opens no file and no connection, loads no extension,
    and its settings are locked; it has 1 GB of memory and two threads.

    Raises:
        UsageError: DuckDB is missing, or refuses the question; anything but one SELECT.
    """
    try:
        import duckdb
    except ModuleNotFoundError:
        raise UsageError("--sql needs the package 'duckdb': pip install 'sequence-zoo[sweep]'.") from None
    with duckdb.connect(":memory:", config=_BEFORE) as connection:
        with tempfile.TemporaryDirectory() as folder:
            for name, table in tables.items():
                path = Path(folder) / f"{name}.parquet"
                table.write_parquet(path)
                connection.execute(f"CREATE TABLE {name} AS FROM read_parquet(?)", [str(path)])
        for setting in _AFTER:
            connection.execute(setting)
        try:
            statements = connection.extract_statements(text)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
                raise UsageError(f"--sql {quoted(text, 60)} is not allowed: it should be one SELECT, not {kinds}.")
            found = connection.execute(statements[0])
            return Answer([column[0] for column in found.description or ()], found.fetchall())
        except duckdb.Error as error:
            reason = " ".join(str(error).partition("\nLINE ")[0].split())
            raise UsageError(f"--sql {quoted(text, 60)}: {reason}") from None


__all__ = ["Answer", "query"]
