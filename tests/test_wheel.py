"""A wheel and a source archive of this tree, installed in an environment of their own with nothing that is optional."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import zoo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


def built(tmp_path: Path) -> Path:
    """A folder with a wheel and a source archive: the one named by DIST (`make release-check`), else built here."""
    if named := os.environ.get("DIST"):
        return Path(named)
    tree = tmp_path / "tree"  # a copy, since a build leaves its traces where it runs
    for name in ("zoo", "tasks", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", tree, cwd=tmp_path)  # the wheel, from the sdist
    return tmp_path / "dist"


def test_wheel_trains_outside_the_checkout(tmp_path):
    dist = built(tmp_path)
    (wheel,) = dist.glob("sequence_zoo-*.whl")
    assert wheel.name.startswith(f"sequence_zoo-{zoo.__version__}-")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"zoo"}
    assert {"zoo/benchmarks/throughput.py", "zoo/py.typed"} <= set(names)
    assert not [name for name in names if "studies" in name]
    own = tmp_path / "tasks.py"  # in the way of nothing
    own.write_text("def build(): pass\n")
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    # The same torch as here first, so that no other build is fetched.
    run(scripts / "python", "-m", "pip", "install", f"torch=={torch.__version__.split('+')[0]}", cwd=tmp_path)
    run(scripts / "python", "-m", "pip", "install", wheel, cwd=tmp_path)
    listed = run(scripts / "python", "-m", "pip", "list", "--format=json", cwd=tmp_path)
    installed = {package["name"] for package in json.loads(listed)}
    assert "sequence-zoo" in installed
    assert not installed & {"tensorboard", "torchdiffeq", "tokenizers", "pytest", "transformers"}
    assert run(scripts / "zoo", "--version", cwd=tmp_path) == f"sequence-zoo {zoo.__version__}\n"
    assert "train.lr" in run(scripts / "zoo", "list", "options", "train.l*", cwd=tmp_path)
    assert "parameters" in run(scripts / "zoo", "train", "mqar", "--dry-run", cwd=tmp_path)
    where = run(scripts / "python", "-c", "import zoo; print(zoo.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where
    assert "sudoku-9x9" in run(scripts / "zoo", "list", "recipes", cwd=tmp_path)
    short = ("train.steps=3", "train.eval_rows=16", "train.test_rows=16")
    run(scripts / "zoo", "train", "mqar-demo", "--variant", "conv-attention", "out=runs/wheel", *short, cwd=tmp_path)
    run(scripts / "zoo", "compare", "runs/wheel", "--report", "report.html", cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "accuracy" in run(scripts / "zoo", "eval", "runs/wheel/conv-attention", cwd=tmp_path)
    assert run(scripts / "zoo", "show", "sudoku", "size=4", cwd=tmp_path)
    (archive,) = dist.glob("sequence_zoo-*.tar.gz")
    run(scripts / "python", "-m", "pip", "uninstall", "--yes", "sequence-zoo", cwd=tmp_path)
    run(scripts / "python", "-m", "pip", "install", "--no-deps", archive, cwd=tmp_path)
    assert "mqar" in run(scripts / "zoo", "list", "tasks", cwd=tmp_path)
