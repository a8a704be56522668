"""The benchmarks of the ops: none is left out, and a peer that is not installed is a row that says so.

Their cases also show which forms every op offers, which the page on GPUs lists.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from zoo import ops
from zoo.benchmarks.studies import forward_passes
from zoo.benchmarks.studies import ops as study
from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.bridge import OPERATORS

OPS = {name for name in ops.__all__ if (Path(ops.__file__).parent / f"_{name}.py").exists()}


@pytest.fixture(scope="module")
def cases():
    """The last case of each op, by the name of the op."""
    return {name.split(",")[0]: case for name, case in study.cases().items()}


def test_every_op_has_a_case(cases):
    assert {"attention", "dplr", "ttt", "token_shift"} <= OPS
    assert cases.keys() >= OPS


class Asked(Exception):
    """An op asks which form is to run."""


def test_the_page_on_gpus_has_the_forms_that_the_ops_offer_there(cases, monkeypatch):
    def asked(op, backend, n_steps, few_steps, offers=(), plain=common.PLAIN, **how):
        raise Asked(op, [form for form in (*offers, plain[-1]) if form != "compiled"])

    monkeypatch.setattr(common, "choose_form", asked)
    offered = {}
    for name in OPS:
        if "choose_form(" in inspect.getsource(sys.modules[f"zoo.ops._{name}"]):
            with pytest.raises(Asked) as found:
                cases[name].form("auto")(cases[name].inputs)
            op, forms = found.value.args
            offered[op] = forms
    page = (Path(ops.__file__).parents[2] / "docs" / "install-gpu.md").read_text(encoding="utf-8")
    table = page.partition("| op | forms on a GPU")[2].partition("\n\n")[0]
    rows = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in re.findall(r"^\| (`.+) \| (.+) \|$", table, re.M)]
    told = {op: forms for names, forms in rows for op in names}
    assert told == {op: offered[op] for op in told}
    assert told.keys() >= {op for op, forms in offered.items() if len(forms) > 1}
    with_triton = {name for name, operator in OPERATORS.items() if "triton" in operator.forms}
    assert with_triton == {op for op, forms in told.items() if "triton" in forms}


@pytest.mark.parametrize(
    ("op", "form"),
    [("delta_rule", "flash_qla"), ("delta_rule", "fla"), ("mlstm", "mlstm_kernels"), ("mlstm", "triton")],
)
def test_a_form_that_cannot_serve_says_why_in_one_line(cases, op, form):
    with pytest.raises(UsageError, match=f"{op}: backend='{form}' cannot run here: .* the inputs are on cpu.$"):
        cases[op].form(form)(cases[op].inputs)


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
