"""A training small enough to repeat many times: every test of this folder works on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.core.run_files import read_metrics
from zoo.training.train import train

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
# a small training
task: {name: mqar, vocab_size: 64, seq_len: 16, n_pairs: 2}
model: {pattern: short_conv mlp, d_model: 16, dropout: 0.1}
train:
  steps: 40
  batch_size: 4
  ema: 0.9
  eval_every: 10
  log_every: 5
  eval_rows: 8
  test_rows: 8
  checkpoint_every: 7
  threads: 1
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """A recipe file in an empty working folder; its runs go to `runs/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return "small.yaml"


@pytest.fixture
def zoo_command(recipe, start_zoo):
    """Starts the real `zoo` command in the working folder of `recipe`."""
    return start_zoo


def outcome(folder: str | Path) -> dict[str, Any]:
    """All that two equal runs have in common: the bytes of their last weights, and their records without times."""
    folder = Path(folder)
    last = max((folder / "checkpoints").glob("step_*[0-9]"), key=lambda p: int(p.name.split("_")[1]))
    weights = {p.name: p.read_bytes() for p in sorted(last.glob("*.safetensors"))}
    times = ("seconds", "tokens_per_second")
    lines = [{k: v for k, v in line.items() if k not in times} for line in read_metrics(folder)]
    return {"last": last.name, "weights": weights, "lines": lines}


@pytest.fixture
def outcome_of():
    return outcome


_uncut: dict[str, Any] = {}


@pytest.fixture
def uncut(recipe):
    """What comes of a run of `recipe` with these overrides that nothing stops, trained once for all tests."""

    def uncut(overrides: dict[str, Any]) -> dict[str, Any]:
        if (key := json.dumps(overrides)) not in _uncut:
            run = train(recipe, {**overrides, "out": "whole"}, quiet=True)
            _uncut[key] = {"status": run.status, "metrics": run.metrics, "outcome": outcome("whole")}
        return _uncut[key]

    return uncut


_made: dict[str, Path] = {}


@pytest.fixture
def made_once(tmp_path_factory):
    """Makes a folder, or copies that which was made under this key before."""

    def made_once(key: str, folder: Path, make: Callable[[], object]) -> Path:
        if key in _made:
            shutil.copytree(_made[key], folder)
        else:
            make()
            _made[key] = shutil.copytree(folder, tmp_path_factory.mktemp("made") / folder.name)
        return folder

    return made_once
