"""Grouped products: both forms against a loop, empty groups and rows left over."""

from __future__ import annotations

import pytest
import torch

from zoo.ops.grouped import _one_kernel, _products, grouped_feed_forward, grouped_linear, grouped_product

SIZES = [[3, 0, 4, 2], [0, 0, 9, 0], [0, 0, 0, 0], [5, 5, 5, 5]]


@pytest.mark.parametrize("form", [_products, grouped_product, grouped_linear])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_a_loop(form, sizes):
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(20, 5, dtype=torch.float64)
    expected = torch.zeros(20, 5, dtype=torch.float64)
    group = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    for i, g in enumerate(group):
        expected = expected + torch.eye(20, dtype=torch.float64)[i, :, None] * (weight[g] @ x[i])
    actual = form(x, weight, torch.tensor(sizes))
    torch.testing.assert_close(actual, expected)
    if not sum(sizes):
        return
    pairs = [torch.autograd.grad((y * seed).sum(), (x, weight)) for y in (actual, expected)]
    torch.testing.assert_close(*pairs)


def test_operator():
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True)
    torch.library.opcheck(grouped_product, (x, weight, torch.tensor([3, 0, 4, 1])))


def test_autocast():
    x, weight, sizes = torch.randn(9, 6), torch.randn(4, 5, 6), torch.tensor([3, 0, 4, 2])
    with torch.autocast("cpu", torch.bfloat16):
        for form in (grouped_linear, torch.compile(grouped_linear, backend="eager", fullgraph=True)):
            y = form(x, weight, sizes)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), _products(x, weight, sizes).bfloat16().float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_feed_forward(sizes):
    """One group at a time, and all groups in two products."""
    torch._dynamo.reset()
    rng = torch.Generator().manual_seed(0)
    shapes = [(20, 6), (4, 7, 6), (4, 6, 7), (4, 7), (4, 6)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=rng).requires_grad_() for s in shapes]
    real = (torch.arange(20) < sum(sizes))[:, None]

    def run(x, up, down, up_bias, down_bias):
        y = grouped_feed_forward(x, torch.tensor(sizes), up, down, torch.tanh, up_bias, down_bias)
        return y.masked_fill(~real, 0)

    expected = run(*leaves)
    actual = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(actual, expected)
    group = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    x, up, down, up_bias, down_bias = leaves
    for i, g in enumerate(group):
        torch.testing.assert_close(expected[i], down[g] @ torch.tanh(up[g] @ x[i] + up_bias[g]) + down_bias[g])
    if sum(sizes):
        pairs = [torch.autograd.grad(y.square().sum(), leaves) for y in (actual, expected)]
        torch.testing.assert_close(*pairs)


def test_one_kernel():
    """The GPU's form, in torch's own stand-in for it on a CPU."""
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
    sizes = torch.tensor([3, 0, 4, 2])
    actual, expected = _one_kernel(x, weight, sizes), _products(x, weight, sizes)
    torch.testing.assert_close(actual, expected)
    pairs = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (actual, expected)]
    torch.testing.assert_close(*pairs)
