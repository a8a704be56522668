"""The store of a sweep: what is added is read back, whatever was added before, and damaged files are refused."""

from __future__ import annotations

import polars as pl
import pytest

from zoo.core.errors import UsageError
from zoo.sweeps.store import COLUMNS, MOST_FILES, Record, Store, read_sweep

CURVES = [{"step": 1, "split": "train", "seconds": 0.5, "tokens": 8, "loss": 2.0}]
PROBLEMS = {"row": [0, 1], "problem": [7, -7], "accuracy": [0.5, 1.0], "exact": [0.0, 1.0]}


def record(trial: int, **row) -> Record:
    return Record({"trial": trial, "id": f"{trial:04d}", "status": "finished", **row}, CURVES, PROBLEMS)


def test_what_is_added_is_read_back(tmp_path):
    store = Store(tmp_path)
    store.add(record(1, **{"config.train.lr": 1e-3, "seed": 3}))
    store.add(record(0, **{"config.train.lr": 1}))
    trials = store.trials()
    assert trials["trial"].to_list() == [0, 1]
    assert trials["config.train.lr"].to_list() == [1.0, 1e-3]
    assert trials["seed"].to_list() == [None, 3]
    assert store.curves().rows(named=True) == [{"trial": trial, **CURVES[0]} for trial in (0, 1)]
    assert store.problems().filter(trial=1).drop("trial").to_dict(as_series=False) == PROBLEMS
    for name, columns in COLUMNS.items():
        schema = getattr(store, name)().schema
        assert {column: schema[column] for column in columns} == columns


def test_the_newest_of_a_trial_takes_the_place_of_all_before(tmp_path):
    store = Store(tmp_path)
    store.add(record(0, status="running"))
    store.add(record(0, status="finished"))
    assert store.trials()["status"].to_list() == ["finished"]
    assert len(store.curves()) == 1
    assert len(store.problems()) == 2


def test_one_file_is_made_of_many(tmp_path):
    store = Store(tmp_path)
    for i in range(2 * MOST_FILES + 3):
        store.add(Record({"trial": i % MOST_FILES, "status": str(i)}))
    before = store.trials()
    assert len(list(store.folder.iterdir())) < MOST_FILES
    assert before["trial"].to_list() == list(range(MOST_FILES))
    assert before["status"][2] == str(2 * MOST_FILES + 2)
    store.compact()
    assert [path.name for path in store.folder.iterdir()] == ["trials.parquet"]
    assert store.trials().equals(before)
    store.add(Record({"trial": 0, "status": "newer"}))  # numbers begin again, above the whole
    assert store.trials()["status"][0] == "newer"


def test_a_crash_while_files_become_one_leaves_the_newest(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for status in ("running", "failed", "finished"):
        store.add(Record({"trial": 0, "status": status}))
    removed = []
    real = type(tmp_path).unlink

    def once(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, **options)

    monkeypatch.setattr(type(tmp_path), "unlink", once)
    with pytest.raises(KeyboardInterrupt):
        store.compact("trials")
    monkeypatch.undo()
    assert removed
    assert store.trials()["status"].to_list() == ["finished"]


def test_values_of_several_kinds_become_text(tmp_path):
    store = Store(tmp_path)
    values = [1, "a", [1, 2], True, None]
    for trial, value in enumerate(values):
        store.add(Record({"trial": trial, "set.task.x": value, "set.task.n": value if value != "a" else 2.5}))
    assert store.trials()["set.task.x"].to_list() == ["1", "a", "[1, 2]", "true", None]


def test_no_store_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no sweep"):
        Store(tmp_path).trials()
    with pytest.raises(UsageError, match=r"has no sweep\.yaml"):
        read_sweep(tmp_path)


def _torn(path):
    path.write_bytes(path.read_bytes()[:-30])


def _foreign(path):
    pl.DataFrame({"x": [1]}).write_parquet(path)


def _of_texts(path):
    pl.DataFrame({column: ["a"] for column in COLUMNS["trials"]}).write_parquet(path)


def _link(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [_torn, _foreign, _of_texts, _link])
def test_damaged_and_foreign_files_are_refused_in_one_line(damage, tmp_path):
    store = Store(tmp_path)
    store.add(record(0))
    damage(store.folder / "trials-00000000.parquet")
    with pytest.raises(UsageError) as error:
        store.trials()
    assert "trials-00000000.parquet" in str(error.value)
    assert "\n" not in str(error.value)
