"""The gated perceptron, its products, plain_norm: compiled forms against float64, in value and in gradient."""

from __future__ import annotations

import pytest
import torch

from zoo.ops import _gated_mlp as ops
from zoo.ops import native, normed_product, plain_norm

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def dtypes():
    offered = native.why_not() is None and ops._has_bfloat16()
    skip = pytest.mark.skipif(not offered, reason="this CPU has no avx512_bf16, or has better")
    return [torch.float32, pytest.param(torch.bfloat16, marks=skip)]


def outcome(function, leaves, dtypes, seed):
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip(leaves, dtypes, strict=True)]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, seed.to(y.dtype))]


def agree(found, exact, dtype):
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() < TOLERANCE[dtype] * b.abs().max()


def layer(shape, along_time, hidden, dtype):
    """x and the three weights, such as `dtype` holds exactly."""
    width = shape[1] if along_time else shape[-1]
    tensors = [
        torch.randn(shape),
        *torch.randn(2, hidden, width) * width**-0.5,
        torch.randn(width, hidden) * hidden**-0.5,
    ]
    return [t.to(dtype).double() for t in tensors]


@needs_compiler
@pytest.mark.parametrize("inner_norm", [False, True])
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(
    ("shape", "hidden", "along_time"),
    [
        ((3, 70, 32), 96, False),
        ((301, 97), 130, False),
        ((2, 350, 16), 1, False),
        ((700, 128), 352, False),
        ((3, 97, 70), 100, True),
        ((2, 33, 163), 64, True),
        ((200, 3, 2), 8, True),
    ],
)
def test_forms_agree(shape, hidden, along_time, dtype, inner_norm, poisoned_memory):
    hidden += 2 * inner_norm  # the norm of a single number is its sign, without a gradient
    leaves, seed = layer(shape, along_time, hidden, dtype), torch.randn(shape).to(dtype).double()
    run = lambda *leaves: ops.gated_mlp(*leaves, along_time=along_time, inner_norm=inner_norm)  # noqa: E731
    exact = outcome(run, leaves, [torch.float64] * 4, seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = outcome(run, leaves, [dtype, *[torch.float32] * 3], seed)
        with ops.constant_weights():
            again = outcome(run, leaves, [dtype, *[torch.float32] * 3], seed)
    assert found[0].dtype == dtype
    agree(found, exact, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@needs_compiler
def test_a_call_of_many_rows_takes_the_kernel_and_rows_do_not_depend_on_each_other():
    x, *weights = (t.float() for t in layer((400, 64), False, 96, torch.float32))
    assert ops.why_not(x, *weights) is None
    for normed in (False, True):
        found, wide = (ops.gated_mlp(rows, *weights, inner_norm=normed) for rows in (x[100:], x))
        assert torch.equal(found, wide[100:])
    assert "few rows" in ops.why_not(x[:9], *weights)
    assert "float64" in ops.why_not(x.double(), *weights)


@needs_compiler
@pytest.mark.parametrize("inner_norm", [False, True])
def test_a_single_step_is_that_of_the_definition(inner_norm):
    leaves = layer((3, 1, 32), False, 40, torch.float32)
    exact = ops.gated_mlp(*leaves, inner_norm=inner_norm)
    agree([ops.gated_mlp(*(x.float() for x in leaves), inner_norm=inner_norm)], [exact], torch.float32)


@needs_compiler
def test_rows_along_time_are_channels():
    """(B, K, D) has B D rows, however many steps they have."""
    x, *weights = (t.float() for t in layer((2, 400, 16), True, 8, torch.float32))
    assert "few rows" in ops.why_not(x, *weights, along_time=True)
    x, *weights = (t.float() for t in layer((2, 9, 160), True, 8, torch.float32))
    assert ops.why_not(x, *weights, along_time=True) is None


@needs_compiler
def test_weights_packed_once_are_not_mistaken_for_others():
    x, *weights = (t.float() for t in layer((400, 64), False, 96, torch.float32))
    with ops.constant_weights():
        for factor in (1.0, 2.0, 3.0):  # temporaries, whose memory the next ones may get
            found = ops.gated_mlp(x, *[w * factor for w in weights])
            assert torch.equal(found, ops.gated_mlp(x, *[w * factor for w in weights]))
    changed = [w.clone() for w in weights]
    before = ops.gated_mlp(x, *changed)
    changed[0].mul_(2)
    assert not torch.equal(before, ops.gated_mlp(x, *changed))


@needs_compiler
@pytest.mark.parametrize(("shape", "hidden"), [((3, 70, 32), 96), ((150, 33), 50)])
def test_compiles_to_one_graph(shape, hidden):
    leaves = layer(shape, False, hidden, torch.float32)
    seed = torch.randn(shape)
    expected = outcome(ops.gated_mlp, leaves, [torch.float32] * 4, seed)
    torch._dynamo.reset()
    compiled = torch.compile(ops.gated_mlp, fullgraph=True, backend="aot_eager")
    for a, b in zip(outcome(compiled, leaves, [torch.float32] * 4, seed), expected, strict=True):
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_nothing_to_it(default):
    leaves, seed, x = layer((150, 33), False, 50, torch.float32), torch.randn(150, 33), torch.randn(70, 33, 4)
    run = lambda: [  # noqa: E731
        *outcome(ops.gated_mlp, leaves, [torch.float32] * 4, seed),
        *outcome(lambda x: plain_norm(x, dim=1), [x], [torch.float32], x),
    ]
    expected = run()
    torch.set_default_dtype(default)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
def test_tangents_pass():
    """Forward-mode differentiation, which no kernel knows."""
    x, *weights = (t.float() for t in layer((400, 64), False, 96, torch.float32))
    run = lambda x: ops.silu_product(plain_norm(ops.gated_mlp(x, *weights)), x)  # noqa: E731
    tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]
    step = 1e-3 * torch.ones_like(x)
    assert torch.allclose(tangent, (run(x + step) - run(x - step)) / 2e-3, atol=1e-2)


@needs_compiler
def test_what_does_not_fit_never_reaches_a_kernel():
    x, gate, up, down = (t.float() for t in layer((400, 64), False, 96, torch.float32))
    for wrong in ((x[:, :50], gate, up, down), (x, gate, up[:90], down), (x, gate, up, down[:, :90])):
        with pytest.raises(RuntimeError):
            ops.gated_mlp(*wrong)
    assert ops.gated_mlp(x, gate, up, down[:30]).shape == (400, 30)
    product = ops.silu_product(x.repeat(1, 10), x[0].repeat(10))
    assert torch.allclose(product, torch.nn.functional.silu(x.repeat(1, 10)) * x[0].repeat(10))


@needs_compiler
def test_weights_of_bfloat16_are_packed_once_too():
    leaves = [t.bfloat16() for t in layer((400, 64), False, 96, torch.bfloat16)]
    if ops.why_not(*leaves) is not None:
        pytest.skip("this CPU multiplies bfloat16 otherwise")
    with ops.constant_weights():
        for _ in range(3):
            ops.gated_mlp(*leaves)
        assert len(ops._packed.get()) == 1
    run = outcome(ops.gated_mlp, leaves, [torch.bfloat16] * 4, leaves[0])
    assert all(g.dtype == torch.bfloat16 for g in run)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_product(dtype, poisoned_memory):
    leaves = [3 * torch.randn(3, 70, 133).to(dtype).double() for _ in range(2)]
    seed = torch.randn(3, 70, 133).to(dtype).double()
    exact = outcome(ops.silu_product, leaves, [torch.float64] * 2, seed)
    agree(outcome(ops.silu_product, leaves, [dtype] * 2, seed), exact, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 70, 133), (1, 300, 64), (20000, 1)])
def test_normed_product(shape, dtype, poisoned_memory):
    leaves = [3 * torch.randn(shape).to(dtype).double() for _ in range(2)]
    seed = torch.randn(shape).to(dtype).double()
    plain = lambda gate, up: torch.sigmoid(gate) * torch.nn.functional.rms_norm(gate * up, shape[-1:], eps=1e-5)  # noqa: E731
    exact = outcome(plain, leaves, [torch.float64] * 2, seed)
    agree(outcome(normed_product, leaves, [torch.float64] * 2, seed), exact, torch.float32)
    agree(outcome(normed_product, leaves, [dtype] * 2, seed), exact, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(5, 70, 133), (1, 300, 64)])
def test_plain_norm(shape, dim, dtype, poisoned_memory):
    x, seed = torch.randn(2, *shape).to(dtype).double()
    norm = lambda x: plain_norm(x, dim=dim)  # noqa: E731
    agree(outcome(norm, [x], [dtype], seed), outcome(norm, [x], [torch.float64], seed), dtype)


@needs_compiler
def test_recomputing_gives_the_same_gradients():
    leaves, seed = layer((3, 70, 32), False, 96, torch.float32), torch.randn(3, 70, 32)
    again = lambda *leaves: torch.utils.checkpoint.checkpoint(ops.gated_mlp, *leaves, use_reentrant=False)  # noqa: E731
    expected = outcome(ops.gated_mlp, leaves, [torch.float32] * 4, seed)
    for a, b in zip(outcome(again, leaves, [torch.float32] * 4, seed), expected, strict=True):
        assert torch.equal(a, b)
