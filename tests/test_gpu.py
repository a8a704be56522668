"""On another device: every form of every op, and every mixer, against float64 on the CPU, forward and backward.

The same comparisons run on the CPU too, with everything that is made without a device on yet another one: what is wrong
with a comparison itself is seen there. The laws on a GPU are in `test_laws.py`; `make gpu` measures all of these.

pytest -m "gpu and not slow" -rs
TRITON_INTERPRET=1 pytest tests/test_gpu.py -k "cpu and triton"        where triton is installed
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from zoo.benchmarks.studies.gpu import mixer_values, op_values
from zoo.benchmarks.studies.gpu.op_values import BACKENDS, CASES, LOOPS, OpCase
from zoo.core.errors import UsageError
from zoo.ops.adapters import interpreted
from zoo.ops.bridge import OPERATORS
from zoo.protocol import mixers

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
LENGTHS = (63, 1, 64, 100, 1000)
WITH_TRITON = {name for name, operator in OPERATORS.items() if "triton" in operator.forms}
FAST = {(63, "auto"), (63, "chunked"), (1, "auto")}
"""On a CPU all others are slow."""


@pytest.fixture(autouse=True)
def _other_default_device():
    """What is made without a device comes out on one that holds no numbers."""
    with torch.device("meta"):
        yield


def plain_forms(case: OpCase) -> tuple[str, ...]:
    """Those that run everywhere."""
    return ("auto", "reference") if case.op in LOOPS else op_values.PLAIN


def places():
    """Case, device, length and form."""
    for name, case in CASES.items():
        for T in (T for T in LENGTHS if case.most >= T):
            for backend in BACKENDS:
                marks = () if (T, backend) in FAST else pytest.mark.slow
                if backend in plain_forms(case):
                    yield pytest.param(name, "cpu", T, backend, marks=marks)
                elif interpreted() and backend == "triton" and case.op in WITH_TRITON and T <= 100:
                    yield pytest.param(name, "cpu", T, backend)
                if backend not in op_values.PLAIN or backend in plain_forms(case):
                    yield pytest.param(name, "cuda", T, backend, marks=GPU)


@functools.lru_cache(maxsize=2)
def expected(name: str, T: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The leaves of a case, and what comes of them in float64."""
    leaves = op_values.leaves_of(CASES[name], T)
    return leaves, op_values.exact_values(CASES[name], leaves)


@DTYPES
@pytest.mark.parametrize(("name", "device", "T", "backend"), [*places()])
def test_ops(name, device, T, backend, dtype):
    case = CASES[name]
    leaves, exact = expected(name, T)
    try:
        got = op_values.values(case, leaves, device, dtype, backend)
    except UsageError as refusal:
        if backend in plain_forms(case):
            raise
        pytest.skip(str(refusal))
    error, of = op_values.worst(case, leaves, got, exact)
    assert error <= op_values.tolerance(backend, dtype), of


def test_the_cases_are_awkward():
    """No leaf is zero, all are what bfloat16 holds, and their gradients are there."""
    for name in CASES:
        leaves, exact = expected(name, 63)
        for leaf, x in leaves.items():
            assert torch.equal(x, x.bfloat16().double()), (name, leaf)
            assert x.abs().max() > 0, (name, leaf)
        for leaf, gradient in zip(leaves, exact[-len(leaves) :], strict=True):
            assert gradient.abs().max() > op_values.FLOOR / 50, (name, leaf)


@DTYPES
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", mixers.names())
def test_mixers(name, dtype, device):
    error, tolerance = mixer_values.compared(name, device, dtype)
    assert error <= tolerance
