"""Second derivatives of every op, and of other people's kernels behind them."""

from __future__ import annotations

import ast
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.laws import noise
from zoo.norms import make_norm
from zoo.ops import gated_mlp, gated_norm, native, normed_product, silu_product
from zoo.ops.derivatives import gradients_of, guarded, once_only
from zoo.ops.grouped import grouped_product

SOURCES = sorted(pathlib.Path(zoo.__file__).parent.rglob("*.py"))
PLAIN = {
    "_BoundedSqrt": "its backward pass is plain operators",
    "_Beside": "so is this one",
    "_Closed": "it passes no gradient at all",
    "_Clipped": "a clamp; the op refuses second derivatives where gradients are clipped",
}


def test_every_backward_pass_says_what_its_own_gradient_is():
    """`once_differentiable` drops terms in silence; every backward pass is marked with what serves in its place."""
    functions, kernels = {}, set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "once_differentiable\n" not in text, path
        if "torch.autograd.Function" not in text and ".register_autograd(" not in text:
            continue
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and "torch.autograd.Function" in map(ast.unparse, node.bases):
                backward = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "backward")
                functions[node.name, path.name] = ast.unparse(backward)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".register_autograd"):
                kernels.add(path.name)
                assert "once(" in text, path
    assert len(functions) > 10
    assert kernels == {"bridge.py", "grouped.py"}
    for (name, _), backward in functions.items():
        if "@first_derivative" in backward:  # refused, see tests/test_pieces.py
            continue
        assert "@once(" in backward or "differentiated(" in backward or name in PLAIN, name


def hessian_product(f, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    y = f(*inputs)
    loss = (y * noise(*y.shape, seed=8).to(y)).sin().mean()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    dot = sum((g * noise(*g.shape, seed=10 + i).to(g)).sum() for i, g in enumerate(grads))
    return list(torch.autograd.grad(dot, inputs))


KERNELS = {
    "gated_mlp": (gated_mlp, [(300, 24), (40, 24), (40, 24), (24, 40)]),
    "gated_mlp along time": (lambda *t: gated_mlp(*t, along_time=True), [(20, 24, 20), (40, 24), (40, 24), (24, 40)]),
    "gated_mlp, normed": (lambda *t: gated_mlp(*t, inner_norm=True), [(300, 24), (40, 24), (40, 24), (24, 40)]),
    "silu_product": (silu_product, [(300, 70), (300, 70)]),
    "normed_product": (normed_product, [(300, 70), (300, 70)]),
    "gated_norm": (lambda x, z, w: gated_norm(x, z, w, n_groups=2), [(300, 70), (300, 70), (70,)]),
    "gate before norm": (lambda x, z, w: gated_norm(x, z, w, norm_before_gate=False), [(300, 70), (300, 70), (70,)]),
    "norm without weights": (make_norm("rmsnorm_plain", 70), [(3, 100, 70)]),
    "norm along time": (make_norm("rmsnorm_plain", 70, axis="time"), [(3, 100, 70)]),
    "grouped product": (lambda x, w: grouped_product(x, w, torch.tensor([5, 0, 11])), [(20, 6), (3, 7, 6)]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_small_kernels_have_second_derivatives(name):
    f, shapes = KERNELS[name]
    inputs = [0.3 * noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = hessian_product(f, inputs, torch.float64)
    for actual, e in zip(hessian_product(f, inputs, torch.float32), expected, strict=True):
        assert (actual - e).abs().max() <= 2e-5 * max(x.abs().max() for x in expected)


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_third_derivatives_of_a_norm():
    """Its backward pass reads its outputs, which then get gradients too."""

    def third(dtype: torch.dtype) -> Tensor:
        x = noise(3, 100, 70).to(dtype).requires_grad_()
        y = make_norm("rmsnorm_plain", x.shape[-1])(x).pow(3).sum()
        for seed in (1, 2):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = (g * noise(*g.shape, seed=seed).to(g)).pow(2).sum()
        return torch.autograd.grad(y, x)[0]

    expected = third(torch.float64)
    assert (third(torch.float32) - expected).abs().max() <= 1e-4 * expected.abs().max()


class Other(torch.autograd.Function):
    """Somebody's kernel for x^3 whose gradient passes no gradient on."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, d):
        (x,) = ctx.saved_tensors
        return (3 * x.detach() ** 2 * d).detach()


def test_other_kernels_are_guarded():
    x = noise(7).requires_grad_()

    def kernel(x: Tensor) -> Tensor:
        return guarded(lambda x: x**3, (Other.apply(x),), (x,))[0]

    assert torch.equal(torch.autograd.grad(kernel(x).sum(), x)[0], 3 * x.detach() ** 2)
    assert torch.autograd.gradgradcheck(kernel, x)
    assert guarded(lambda x: x**3, (x.detach(),), (x,))[0].grad_fn is None


def test_what_has_no_second_derivative_says_so():
    x = noise(7).requires_grad_()
    y = once_only(x * 2, "this: no second derivatives")
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], torch.full_like(x, 2))
    with pytest.raises(zoo.UsageError, match="this: no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_gradients_of_inputs_that_depend_on_each_other():
    """Only the direct share belongs to an input that another one is made of."""
    a = noise(4).requires_grad_()
    d_a, d_b, none = gradients_of(lambda a, b, n: a * b * n, (a, a.exp(), 3), torch.ones(4).double())
    assert none is None
    assert torch.allclose(d_a, 3 * a.exp())
    assert torch.allclose(d_b, 3 * a)
    assert d_a.requires_grad


@pytest.mark.parametrize("backend", ["auto", "sdpa", "chunked", "reference"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"causal": False}, {"sinks": True}, {"softcap": 2.0}], ids=str)
def test_attention(backend, options):
    if backend == "sdpa" and {"sinks", "softcap"} & options.keys():
        pytest.skip("sdpa knows neither")
    inputs = [noise(1, 7, 2, 2).requires_grad_(), *(noise(1, 7, 1, 2, seed=i).requires_grad_() for i in (1, 2))]
    options = {**options, "sinks": noise(2, seed=3)} if "sinks" in options else options
    chunk = {"chunk_size": 3} if backend == "chunked" else {}
    f = lambda q, k, v: zoo.ops.attention(q, k, v, backend=backend, **options, **chunk)[0]  # noqa: E731
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_gradients_in_batches_are_refused():
    x, w = noise(1, 9, 8).requires_grad_(), noise(8, 3)
    y, _ = zoo.ops.causal_conv1d(x, w)
    with pytest.raises(zoo.UsageError, match="jacrev"):
        torch.autograd.grad(y[0, -1], x, torch.eye(8).double(), is_grads_batched=True)


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_autocast_stays_out_of_second_derivatives():
    """Those of a kernel: plain operators that are differentiated under autocast are those of autocast."""
    shapes = [(300, 24), (40, 24), (40, 24), (24, 40)]
    x = [0.3 * noise(*shape, seed=i).float() for i, shape in enumerate(shapes)]
    expected = hessian_product(lambda x, g, u, d: F.linear(F.silu(x @ g.mT) * (x @ u.mT), d), x, torch.float32)
    x = [t.requires_grad_() for t in x]
    y = gated_mlp(*x)
    loss = (y * noise(*y.shape, seed=8).to(y)).sin().mean()
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(loss, x, create_graph=True)
    dot = sum((g * noise(*g.shape, seed=10 + i).to(g)).sum() for i, g in enumerate(grads))
    found = torch.autograd.grad(dot, x)
    for actual, e in zip(found, expected, strict=True):
        assert (actual - e).abs().max() <= 2e-5 * max(x.abs().max() for x in expected)
