"""`make gpu` on a CPU: every part reports, what hangs or crashes ends alone, and a rerun continues."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.benchmarks.studies.gpu import STUDY, page, parts, peers, runner, study, timing, wheels
from zoo.benchmarks.studies.gpu.child import measured
from zoo.benchmarks.studies.gpu.op_values import CASES, leaves_of, worst
from zoo.benchmarks.studies.gpu.part import CRASHED, FAILED, NO_MEMORY, NOT_OFFERED, OK, OVER, Part, Settings, settled
from zoo.core.errors import UsageError

ROOT = Path(__file__).parents[1]
ABSENT = "typer matplotlib PIL plotly polars tensorboard tokenizers sklearn ray duckdb wandb mlflow transformers pytest"
"""Some packages that no part needs."""
HIDING = "import sys\nfor name in {names!r}.split():\n    sys.modules[name] = None\n"
TRIAL = """
import os, time
from zoo.benchmarks.studies.gpu.part import Part

def fine():
    return {"number": 1}

def raises():
    raise RuntimeError("CUDA error: an illegal memory access\\nmore")

def dies():
    os.kill(os.getpid(), 11)

def hangs():
    time.sleep(600)

def items(settings):
    return {"fine": fine, "raises": raises, "dies": dies, "after": fine, "hangs": hangs, "last": fine}

def lines(rows):
    return [f"{len(rows)} are fine."]

PART = Part("trial", "A trial", "Of what goes wrong.", 60, 1.0, items, lines)
"""


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A part whose items hang and crash, beside those of the study; and packages that are not there."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "trial_part.py").write_text(TRIAL)
    (folder / "sitecustomize.py").write_text(HIDING.format(names=ABSENT))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(parts.MODULES, "trial", "trial_part")


@pytest.mark.slow
def test_every_part_reports_and_a_rerun_continues(trial, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--toy", "--device", "cpu", "--out", str(out)]
    STUDY.main([*common, "--limit", "3000"])
    data = STUDY.read(out)
    assert [*data["parts"]] == [*parts.ORDER, "trial"]
    for name in parts.ORDER:
        found = data["parts"][name]
        assert found["ended"] == "complete", name
        assert [*found["rows"]] == found["items"], name
        assert {row["status"] for row in found["rows"].values()} <= {OK, NOT_OFFERED}, name
        assert OK in {row["status"] for row in found["rows"].values()}, name
        assert not any(row.get("wrong") for row in found["rows"].values()), name
    for name, row in data["parts"]["peers"]["rows"].items():
        for who, function in row.get("functions", {}).items():
            assert function["status"] in (NOT_OFFERED, FAILED) or function["right"], (name, who)
            assert function["status"] != FAILED or who.startswith("SDPA"), (name, who)

    went = {name: row["status"] for name, row in data["parts"]["trial"]["rows"].items()}
    assert went == {"fine": OK, "raises": FAILED, "dies": CRASHED, "after": OK, "hangs": OVER, "last": OK}
    assert "SIGSEGV" in data["parts"]["trial"]["rows"]["dies"]["why"]
    assert data["parts"]["trial"]["rows"]["raises"]["why"] == "RuntimeError: CUDA error: an illegal memory access"
    text = (out / "gpu.md").read_text()
    assert text == STUDY.markdown(data)
    assert "- hangs: stopped by its limit (it took more than 1 s)" in text
    assert "3 are fine." in text
    assert "not yet measured" not in text.lower()

    first = data["parts"]["sudoku"]["rows"]["sudoku-9x9-fast"]
    assert 0 < first["step"] < 8
    assert first["more"]
    STUDY.main([*common, "--limit", "3000", "--parts", "sudoku", "trial", "recall"])
    data = STUDY.read(out)
    then = data["parts"]["sudoku"]["rows"]["sudoku-9x9-fast"]
    assert (then["step"], then["more"], then["run_status"]) == (8, False, "finished")
    assert [at["step"] for at in then["curve"]] == [2, 4, 6, 8]
    assert {row["session"] for row in data["parts"]["recall"]["rows"].values()} == {0}  # nothing was missing
    assert {name: row["session"] for name, row in data["parts"]["trial"]["rows"].items()} == {
        "fine": 0, "raises": 1, "dies": 1, "after": 0, "hangs": 1, "last": 0
    }  # fmt: skip

    STUDY.main([*common, "--limit", "9", "--parts", "trial", "--again"])  # 6 s for what takes longer
    kept = STUDY.read(out)["parts"]
    assert kept["trial"]["ended"].startswith("stopped by its limit of ")
    assert kept["sudoku"] == data["parts"]["sudoku"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("machine: complete; recall: complete; correct: complete")


class Ended:
    """A process that has ended with a status, or never does (None) until it is killed."""

    pid = returncode = None

    def __init__(self, status):
        self.status = status

    def poll(self):
        return self.status

    def kill(self):
        self.status = -9

    def wait(self):
        self.returncode = self.status


def ran(monkeypatch, tmp_path, *children, item_seconds=100.0, seconds=30.0):
    """What the runner makes of children, each lines and a status (None hangs)."""
    queue = [*children]

    def start(module, part, settings, done, file, end):
        lines, status = queue.pop(0)
        with file.open("a") as written:
            written.writelines(json.dumps(line) + "\n" for line in lines)
        return Ended(status)

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner.os, "killpg", lambda *_: None, raising=False)
    part = Part("trial", "", "", 1, item_seconds, lambda _: {}, lambda _: [])
    rows, ended = {}, None
    for what, found in runner.run("trial", part, Settings("cpu", True, str(tmp_path), seconds), {"done"}):
        if what == "row":
            rows[found[0]] = found[1]["status"]
        elif what == "ended":
            ended = found
    assert not queue
    return rows, ended


ITEMS = {"items": ["done", "a", "b"]}


def row(name):
    return [{"begin": name}, {"item": name, "row": {"status": OK}}]


def test_a_part_that_ends_is_complete(monkeypatch, tmp_path):
    assert ran(monkeypatch, tmp_path, ([ITEMS, *row("a"), *row("b")], 0)) == ({"a": OK, "b": OK}, "complete")


def test_what_crashes_is_noted_and_the_rest_is_measured(monkeypatch, tmp_path):
    crash = ([ITEMS, {"begin": "a"}], -11)
    assert ran(monkeypatch, tmp_path, crash, ([ITEMS, *row("b")], 0)) == ({"a": CRASHED, "b": OK}, "complete")


def test_what_makes_the_gpu_unusable_ends_its_process_alone(monkeypatch, tmp_path):
    failed = {"item": "a", "row": {"status": FAILED, "why": "illegal"}}
    poisoned = ([ITEMS, {"begin": "a"}, failed], 3)
    assert ran(monkeypatch, tmp_path, poisoned, ([ITEMS, *row("b")], 0)) == ({"a": FAILED, "b": OK}, "complete")


def test_what_hangs_is_killed(monkeypatch, tmp_path):
    hanging = ([ITEMS, {"begin": "a"}], None)
    rows, ended = ran(monkeypatch, tmp_path, hanging, ([ITEMS, *row("b")], 0), item_seconds=0.2)
    assert (rows, ended) == ({"a": OVER, "b": OK}, "complete")


def test_a_part_is_stopped_by_its_limit(monkeypatch, tmp_path):
    rows, ended = ran(monkeypatch, tmp_path, ([ITEMS, *row("a"), {"begin": "b"}], None), seconds=0.3)
    assert (rows, ended) == ({"a": OK, "b": OVER}, "stopped by its limit of 0 s")
    rows, ended = ran(monkeypatch, tmp_path, ([ITEMS, *row("a")], 0), seconds=0.3)  # it saw that no time was left
    assert (rows, ended) == ({"a": OK}, "stopped by its limit of 0 s")


def test_a_part_that_cannot_begin_says_why(monkeypatch, tmp_path):
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "log.txt").write_text("Traceback ...\nImportError: no such library\n")
    assert ran(monkeypatch, tmp_path, ([], 1)) == (
        {}, "its process ended by itself (the process ended with status 1): ImportError: no such library"
    )  # fmt: skip


def test_no_item_raises():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def refused():
        raise UsageError("no.")

    assert measured(lambda: {"x": 1}) == {"status": OK, "x": 1}
    assert measured(out_of_memory)["status"] == NO_MEMORY
    assert measured(refused) == {"status": NOT_OFFERED, "why": "no."}
    assert measured(lambda: 1 / 0) == {"status": FAILED, "why": "ZeroDivisionError: division by zero"}


def test_what_failed_or_continues_is_measured_again():
    assert settled({"status": OK})
    assert settled({"status": NO_MEMORY})
    assert not settled({"status": OK, "more": True})
    assert not any(settled({"status": status}) for status in (FAILED, OVER, CRASHED))


def test_the_page_without_data_lists_what_will_be_measured():
    text = STUDY.markdown({})
    assert "Not yet measured" in text
    assert all(f"(`{name}`)" in text for name in parts.ORDER)
    assert "make gpu" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--toy", "--device", "cpu"], "--toy writes nothing into docs/results"),
        (["--device", "cpu", "--out", "elsewhere"], "--device cpu is for trying the command"),
        (["--device", "gpu", "--out", "elsewhere"], "it should be cuda or cpu"),
        (["--parts", "recal"], "--parts 'recal' is not allowed. Available: machine, recall"),
        (["--limit", "0"], "it should be above 0 seconds"),
    ],
)
def test_wrong_options_end_in_one_line(options, told, capsys):
    with pytest.raises(SystemExit) as ended:
        STUDY.main(options)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    before = (ROOT / "docs" / "results" / "gpu.md").read_bytes()
    with pytest.raises(SystemExit):
        STUDY.main([])
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert (ROOT / "docs" / "results" / "gpu.md").read_bytes() == before


def test_rows_of_toy_size_are_kept_apart(tmp_path, capsys):
    given = argparse.Namespace(parts=None, limit=1.0, device="cpu", toy=True, out=tmp_path)
    assert [*study.check(given, {})] == [*parts.ORDER]
    with pytest.raises(UsageError, match="has rows at full size"):
        study.check(given, {"toy": False})


def test_missing_packages_are_named_at_once(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDING.format(names="torch pydantic yaml"))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "zoo.benchmarks.studies.gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    first, second, third, where = done.stderr.splitlines()
    said = [line.partition(" is missing: ")[0] for line in (first, second, third)]
    assert said == ["torch", "pydantic", "pyyaml"]
    assert "docs/install-gpu.md" in where


def test_make_gpu_takes_the_python_of_the_machine():
    command = ["make", "--no-print-directory", "-n", "gpu", "GPU_PYTHON=/usr/bin/python9", "GPU=--parts sudoku"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip().endswith("/usr/bin/python9 -m zoo.benchmarks.studies.gpu --parts sudoku")
    assert ".venv" not in told.replace(str(ROOT), "")
    assert "pip" not in told


def test_items_of_full_size_can_be_listed(tmp_path):
    """Names are words and cases that exist; nothing is measured."""
    found = {name: [*part.items(Settings("cpu", False, str(tmp_path), 60))] for name, part in page.all_parts().items()}
    assert {f"forms of {name}" for name in CASES} < {*found["correct"]}
    assert {f"op {name}" for name in peers.CASES} < {*found["peers"]}
    assert len(found["mixers"]) > 40
    for name, items in found.items():
        assert len(items) == len(set(items)), name


def test_a_wrong_form_is_seen():
    case = CASES["scan"]
    leaves = leaves_of(case, 5)
    right = [torch.ones(3), torch.ones(3), *leaves.values()]
    assert worst(case, leaves, right, right)[0] == 0
    off = [x.clone() for x in right]
    off[-1][0] += 1
    assert worst(case, leaves, off, right)[1] == f"gradient of {[*leaves][-1]}"
    off[0][0] = torch.nan
    error, of = worst(case, leaves, off, right)
    assert error != error
    assert of == "output 0"


def test_turns_are_within_the_budget():
    calls = {"a": 0, "b": 0}

    def step(name):
        calls[name] += 1

    found = timing.turns({name: lambda name=name: step(name) for name in calls}, "cpu", 3, 100.0)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}
    assert calls == {"a": 4, "b": 4}
    assert [len(seconds) for seconds in timing.turns({"a": lambda: None}, "cpu", 1000, 0.0).values()] == [1]
    assert timing.ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == [2.0, 1.5, 2.5]


def test_what_is_left_out_has_a_line():
    assert len(wheels.left_out()) <= len(wheels.HELPFUL)
    assert all(line.endswith(".") for line in wheels.left_out())
