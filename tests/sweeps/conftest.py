"""A training of a moment, and sweeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2},
    "model": {"pattern": "short_conv {mixer}", "d_model": 16},
    "words": {"mixer": "mlp"},
    "train": {"steps": 6, "batch_size": 4, "eval_every": 3, "log_every": 3, "eval_rows": 8, "test_rows": 8},
}


@pytest.fixture
def small() -> dict[str, Any]:
    return {k: dict(v) for k, v in SMALL.items()}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
