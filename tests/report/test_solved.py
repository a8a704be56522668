"""Which words have solved which tasks, by the runs in the tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import zoo
import zoo.cli
from zoo.core.errors import UsageError
from zoo.report import solved as module
from zoo.report.solved import solved
from zoo.tasks import list_tasks


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        zoo.cli.main(list(arguments))
    return ended.value.code or 0, *capsys.readouterr()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of results with one run that solved and one that did not, of each kind."""
    time = {"solved": True, "accuracy": 0.99, "seed": 3, "steps": 7, "pattern": "short_conv mha", "commit": "a" * 40}
    files = {
        "time_to_solve.json": {"recommended": [time], "mixers": [time | {"solved": False, "pattern": "lstm"}]},
        "state_tracking.json": {
            "parity": {
                "gru": {"status": "target", "trained": 1.0, "longer": 0.98, "pattern": "gru", "commit": "b" * 40 + "+"},
                "mamba": {"status": "time_budget", "trained": 0.9, "longer": 0.1, "pattern": "mamba", "commit": "b"},
            }
        },
        "recipes.json": {
            "maze-9x9": [
                {"recipe": "maze-9x9", "status": status, "pattern": f"{word} swiglu", "commit": "c" * 40, "test": test}
                for word, status, exact in (
                    ("mha", "finished", 0.96),
                    ("bidirectional(lstm)", "target", 0.9),
                    ("gqa", "time_budget", 0.94),
                )
                for test in [{"exact": exact, "accuracy": 0.999, "n_rows": 1000, "n_problems": 960}]
            ]
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    lines = [
        {
            "setting": {"task": "niah", "options": "n_queries=8", "train_length": 64, "length": length},
            "layer": "short_conv kda swiglu",
            "status": "ok",
            "figures": {"accuracy": {"value": value}},
            "conditions": {"seeds": 1, "test_rows": 128},
            "commit": "d" * 40,
        }
        for length, value in ((64, 0.995), (128, 1.0), (64, 0.98))
    ]
    (tmp_path / "long-context.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(module, "DATA", tmp_path)
    return tmp_path


def test_runs_that_reached_what_they_were_to_reach(data):
    assert [(run.task, run.words) for run in solved()] == [
        ("formal_language", ("gru",)),
        ("maze", ("bidirectional", "lstm") if "bidirectional" in zoo.list_mixers() else ("lstm",)),
        ("maze", ("mha",)),
        ("mqar", ("mha", "short_conv")),
        ("niah", ("kda", "short_conv")),
    ]
    assert solved()[0].source == "state_tracking.json, commit bbbbbbb+"
    assert "1,000 test rows (960 problems)" in solved()[2].known


def test_the_runs_of_the_tree():
    found = solved()
    assert {"mqar", "maze", "sudoku", "state_tracking", "formal_language", "event_xor", "niah"} <= {
        r.task for r in found
    }
    for run in found:
        assert run.task in list_tasks()
        assert run.words
        assert set(run.words) <= set(zoo.list_mixers(kind="sequence"))
        assert (module.DATA / run.source.partition(",")[0]).exists()


def test_command(data, capsys):
    status, out, err = said(capsys, "list", "tasks", "ma*", "--solved")
    assert (status, err) == (0, "")
    assert out.splitlines()[1] == (
        "maze  mha: 96.0% exact, 99.9% of answers, of 1,000 test rows (960 problems), seed 0; recipe maze-9x9"
        " (recipes.json, commit ccccccc)"
    )
    assert out.splitlines()[2] == "No run in the tree has solved: mano."
    (run,) = json.loads(said(capsys, "list", "tasks", "mqar", "--solved", "--json")[1])
    assert run["pattern"] == "short_conv mha"
    assert run["words"] == ["mha", "short_conv"]


def test_refusals(data, capsys):
    assert said(capsys, "list", "mixers", "--solved") == (
        2,
        "",
        "zoo: --solved goes with tasks, not with mixers: zoo list tasks --solved.\n",
    )
    Path(data / "recipes.json").unlink()
    with pytest.raises(UsageError, match=r"not beside the package .*recipes.json.*symbolic links"):
        solved()
