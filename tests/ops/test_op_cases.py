"""The benchmarks of the ops: none is left out, and a peer that is not installed is a row that says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from zoo import ops
from zoo.benchmarks.studies import forward_passes
from zoo.benchmarks.studies import ops as study

OPS = {name for name in ops.__all__ if (Path(ops.__file__).parent / f"_{name}.py").exists()}


def test_every_op_has_a_case():
    assert {"attention", "dplr", "ttt", "token_shift"} <= OPS
    assert {name.split(",")[0] for name in study.cases()} >= OPS


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(forward_passes, "GRID", ((2, 70, 2, 64),))
    monkeypatch.setattr(forward_passes, "WIDTHS", ((2, 70, 32),))


def test_forward_passes(small, tmp_path, monkeypatch):
    """Without the peers: every case runs, and its row says what is missing."""
    for package in ("onnxruntime", "onnx", "ggml"):
        monkeypatch.setitem(sys.modules, package, None)
    threads = torch.get_num_threads()
    try:
        forward_passes.STUDY.main(["--threads", "1", "--repeats", "2", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "forward_passes.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "not installed" in line]
    assert len(rows) == sum(len(peers) for _, peers in forward_passes.cases().values())
    assert {row.split(" | ")[4] for row in rows} >= {"onnxruntime", "ggml rwkv_wkv7", "ggml ssm_scan"}


def test_a_peer_of_other_values_is_refused(small, tmp_path, monkeypatch):
    def wrong(threads, **inputs):
        return lambda: 1.01 * ops.linear_attention(**inputs)[0]

    monkeypatch.setattr(forward_passes.peer_onnxruntime, "linear_attention", wrong)
    with pytest.raises(RuntimeError, match="other values"):
        forward_passes.STUDY.main(
            ["--threads", "1", "--repeats", "2", "--cases", "linear_attention", "--out", str(tmp_path)]
        )
