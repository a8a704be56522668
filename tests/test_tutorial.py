"""The tutorial works as it is written: its cells, its commands, and a process that is killed in the middle."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")
RUN = DOCS / "tutorial_run" / "tutorial.md"
CUT = ["train.steps=6", "train.eval_every=3", "train.eval_rows=16", "train.test_rows=32", "train.checkpoint_every=2"]


def cells(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def commands() -> list[str]:
    block = re.search(r"^```text\n(git clone.*?)^```$", PAGE.partition("## The same in the shell")[2], re.M | re.S)
    assert block is not None
    return block[1].splitlines()


def notebook():
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mixer_of_the_tutorial_is_the_tested_example():
    (written,) = [cell for cell in cells(PAGE) if cell.startswith("%%writefile my_mixer.py\n")]
    assert written.partition("\n")[2] == (DOCS / "examples" / "fading_memory.py").read_text(encoding="utf-8")


def test_only_python_blocks_are_cells():
    assert [cell + "\n" for cell in notebook().cells(PAGE)] == cells(PAGE)


def test_the_committed_run_is_of_this_page():
    if not RUN.exists():
        pytest.skip("no full run is committed")
    assert cells(RUN.read_text(encoding="utf-8")) == cells(PAGE)
    said = set(RUN.read_text(encoding="utf-8").replace("](../", "](").splitlines())
    assert [line for line in PAGE.splitlines() if line not in said] == []
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", RUN.read_text(encoding="utf-8")):
        assert (RUN.parent / picture).exists()


def test_at_most_ten_commands_ask_what_the_notebook_asks():
    assert len(commands()) <= 10
    sweep = next(line for line in commands() if line.startswith("zoo sweep"))
    study = next(cell for cell in cells(PAGE) if "zoo.sweep(" in cell)
    mixers = next(cell for cell in cells(PAGE) if cell.startswith("MIXERS = "))
    assert set(re.findall(r"[\w.]+\(.*?\)|\w+", shlex.split(sweep)[3].partition("=")[2])) == set(
        re.findall(r'"(.*?)"', mixers.partition("\n")[0])
    )
    for option in ("train.lr", "train.steps"):
        there = re.search(rf'"{option}": (\[.*?\]|[\d_]+)', study)
        typed = re.search(rf"{option}=(\[.*?\]|[\d_]+)", sweep)
        assert (there is None) == (typed is None)
        if there and typed:
            assert there[1].replace(" ", "") == typed[1].replace(" ", "")


def command(line: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    words = shlex.split(line)
    words = [sys.executable, "-m", "zoo", *words[1:]] if words[0] == "zoo" else words
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_the_commands_work_and_survive_a_kill(tmp_path):
    (tmp_path / "docs").symlink_to(DOCS)
    root = str(DOCS.parent)
    environment = os.environ | {"PYTHONPATH": root, "ZOO_IMPORT": str(tmp_path / "my_mixer.py"), "OMP_NUM_THREADS": "1"}
    here = commands()[3:]
    assert here[1].startswith("export ZOO_IMPORT=")
    for line in (here[0], here[2]):
        done = command(line, tmp_path, environment)
        assert done.communicate()[0] is not None
        assert done.returncode == 0, line
    sweep = f"{here[3]} --no-ray --quiet {' '.join(CUT)}"
    process = command(sweep, tmp_path, environment)
    results = tmp_path / "runs/study/trials"
    while len(list(results.glob("*/result.json"))) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 4 <= len(before) < 18
    process = command(sweep, tmp_path, environment)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "18 trials: 18 finished" in said
    stored = sorted(before)[:-1]  # the last one may not have reached the store
    assert all(path.stat().st_mtime_ns == before[path] for path in stored)  # none of them was trained twice
    done = command(here[4], tmp_path, environment)
    assert "fading_memory" in done.communicate()[0]
    assert (tmp_path / "study.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_cells_run_at_toy_size(tmp_path):
    made = notebook().execute(PAGE, tmp_path, toy=True)
    notebook().write(made, tmp_path / "page")
    text = (tmp_path / "page" / "tutorial.md").read_text(encoding="utf-8")
    assert "fading_memory: every law holds." in text
    assert "{'finished': 18}" in text
    assert "\x1b" not in text
    assert len(list((tmp_path / "page").glob("*.png"))) == 1
