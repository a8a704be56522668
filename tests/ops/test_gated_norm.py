"""gated_norm: the compiled form against the plain one in float64, in value and in gradient."""

from __future__ import annotations

import functools

import pytest
import torch

from zoo.ops import native
from zoo.ops._gated_norm import FEW_NUMBERS, compiled_norm, gated_norm

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


def outcome(function, inputs, dtype):
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in inputs]
    y = function(*leaves)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], seed.to(dtype))]


@needs_compiler
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("width", "n_groups"), [(5, 1), (64, 1), (66, 3)])
def test_forms_agree(width, n_groups, gated, norm_before_gate):
    x, z = torch.randn(2, 2, 70, width).double()
    inputs = [x, 3 * z if gated else None, torch.randn(width).double()]
    named = {"n_groups": n_groups, "norm_before_gate": norm_before_gate}
    exact = outcome(functools.partial(gated_norm, **named), inputs, torch.float64)
    found = outcome(lambda *x: compiled_norm(*x, n_groups, 1e-5, norm_before_gate), inputs, torch.float32)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


@needs_compiler
def test_many_numbers_take_the_kernel_and_compile_to_one_graph(poisoned_memory):
    x, z = torch.randn(2, 2, FEW_NUMBERS // 64, 64)
    inputs = [x, z, torch.randn(64)]
    two = functools.partial(gated_norm, n_groups=2)
    expected = outcome(two, inputs, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    for a, b in zip(outcome(compiled, inputs, torch.float32), expected, strict=True):
        assert torch.equal(a, b)
