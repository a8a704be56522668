"""Questions in SQL: answers, and that nothing but the tables can be read or written."""

from __future__ import annotations

import sys

import polars as pl
import pytest

from zoo.core.errors import UsageError
from zoo.sweeps import sql
from zoo.sweeps.sql import query

pytest.importorskip("duckdb")

TABLES = {
    "trials": pl.DataFrame({"trial": [0, 1, 2], "config.train.lr": [0.1, 0.1, 0.2], "test.accuracy": [0.5, 0.7, None]}),
    "curves": pl.DataFrame({"trial": [0], "step": [10]}),
}


def test_an_answer():
    found = query(TABLES, 'select "config.train.lr" lr, avg("test.accuracy") mean from trials group by lr order by lr')
    assert found == (["lr", "mean"], [(0.1, pytest.approx(0.6)), (0.2, None)])
    assert query(TABLES, "from curves join trials using (trial) select step").rows == [(10,)]
    assert query(TABLES, "with x as (select 1 as one) select one from x").columns == ["one"]
    assert query({"trials": TABLES["trials"].clear()}, "select * from trials").rows == []


@pytest.mark.parametrize(
    "text",
    [
        "select * from read_csv('{file}')",
        "select * from '{file}'",
        "select * from read_text('{file}')",
        "select * from glob('{folder}/*')",
        "select * from query_table('{file}')",
        "select * from query('copy trials to ''{folder}/out.csv''')",
        "select * from 'http://127.0.0.1:1/x.csv'",
        "select * from read_parquet('https://127.0.0.1:1/x.parquet')",
        "select * from duckdb_secrets()",
        "select * from TABLES",
        "copy trials to '{folder}/out.csv'",
        "attach '{folder}/out.db'",
        "export database '{folder}/out'",
        "install httpfs",
        "load httpfs",
        "set threads = 8",
        "pragma memory_limit = '10GB'",
        "reset enable_external_access",
        "set enable_external_access = true",
        "create table mine as select 1",
        "drop table trials",
        "insert into curves values (1, 2)",
        "select 1; select 2",
        "explain analyze select 1",
        "selec",
        "",
    ],
)
def test_nothing_else_is_read_or_written(text, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError) as refused:
        query(TABLES, text.format(file=tmp_path / "x.csv", folder=tmp_path))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_memory_has_an_end(monkeypatch):
    monkeypatch.setitem(sql._BEFORE, "memory_limit", "32MB")
    with pytest.raises(UsageError, match="Out of Memory"):
        query(TABLES, "select list(range) from range(30000000)")


def test_limits_are_set_and_locked():
    found = query(TABLES, "select current_setting('memory_limit'), current_setting('threads')").rows[0]
    assert found == ("953.6 MiB", 2)
    assert query(TABLES, "select current_setting('lock_configuration')").rows == [(True,)]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UsageError, match=r"duckdb.*sequence-zoo\[sweep\]"):
        query(TABLES, "select 1")
