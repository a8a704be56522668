"""oscillate: every form against the float64 step form, in value, in gradient and in second derivatives."""

from __future__ import annotations

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import native, oscillate

COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}"),
)
FAST = pytest.mark.parametrize("backend", ["chunked", COMPILED])
FORMS = pytest.mark.parametrize("backend", ["reference", "chunked", COMPILED])
CONSTANT = pytest.mark.parametrize("constant", [False, True])


def make(B, T, P, constant=False, copies=(2,)):
    """Oscillators by the implicit rule, and a state."""
    shape = (P,) if constant else (B, T, P)
    dt, A = torch.rand(shape).double(), 2 * torch.rand(shape).double()
    S = 1 + dt * dt * A
    return [torch.randn(B, T, *copies, P).double(), 1 / S, dt * A / S, dt, torch.randn(B, 2, *copies, P).double()]


def outcome(leaves, dtype=torch.float64, **options):
    """Outputs, last state, the gradients of a fixed functional of both, and a product with its second derivatives."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
    out = oscillate(*leaves, **options)
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(dtype) for x in out]
    grads = torch.autograd.grad(out, leaves, seeds, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True, materialize_grads=True)
    assert all(x.dtype == dtype for x in (*out, *grads, *again))
    return [x.detach() for x in (*out, *grads, *again)]


def worst(got, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))


@FAST
@pytest.mark.crossed("T, P", "packed")
@pytest.mark.parametrize("packed", [True, False])
@CONSTANT
@pytest.mark.parametrize(("T", "P"), [(33, 70), (1, 3), (2, 64), (100, 5)])
def test_forms_agree(T, P, constant, packed, backend):
    leaves, options = make(3, T, P, constant), {}
    if packed:
        options = {"resets": torch.rand(3, T) < 0.2, "lengths": torch.tensor([T, T - T // 2, T])}
    exact = outcome(leaves, backend="reference", **options)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        got = outcome(leaves, dtype, backend=backend, **options)
        assert worst(got[:7], exact[:7]) <= tolerance
        assert worst(got, exact) <= 10 * tolerance


@FORMS
@pytest.mark.parametrize("copies", [(), (3,), (2, 2)])
def test_the_definition(copies, backend):
    b, p, q, r, state = make(2, 4, 3, constant=True, copies=copies)
    z, y = state.unbind(1)
    expected = []
    for t in range(4):
        z = p * (z + b[:, t]) - q * y
        y = y + r * z
        expected.append(y)
    got, last = oscillate(b, p, q, r, state, backend=backend)
    torch.testing.assert_close(got, torch.stack(expected, 1))
    torch.testing.assert_close(last, torch.stack([z, y], 1))


@FORMS
@CONSTANT
@torch.no_grad()
def test_a_sequence_can_be_cut_and_rows_are_alone(constant, backend):
    b, *coefficients, state = make(3, 70, 5, constant)
    lengths = torch.tensor([70, 33, 0])
    padding = torch.arange(70) >= lengths[:, None]
    poisoned = [x if constant else x.masked_fill(padding[..., None], torch.nan) for x in coefficients]
    whole, last = oscillate(
        b.masked_fill(padding[..., None, None], torch.nan), *poisoned, state, lengths=lengths, backend=backend
    )
    assert not whole[padding].any()
    torch.testing.assert_close(last[2], state[2])
    for row, n in ((0, 70), (1, 33)):
        one, carried, pieces = slice(row, row + 1), state[row : row + 1], []
        for start, stop in ((0, 1), (1, 20), (20, n)):
            part = [x if constant else x[one, start:stop] for x in coefficients]
            y, carried = oscillate(b[one, start:stop], *part, carried, backend=backend)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole[one, :n])
        torch.testing.assert_close(carried, last[one])


@FAST
@CONSTANT
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(constant, backend, poisoned_memory):
    leaves = make(3, 40, 19, constant)
    before = [x.clone() for x in leaves]
    options = {"resets": torch.rand(3, 40) < 0.1, "lengths": torch.tensor([0, 17, 40])}
    assert all(x.isfinite().all() for x in outcome(leaves, torch.float32, backend=backend, **options))
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True))


@FAST
def test_what_loses_no_energy_stays_exact(backend):
    """10,000 steps of the implicit-explicit rule in float32, whose energy neither grows nor falls."""
    P, dt = 4, 0.5
    A = torch.linspace(0.25, 2, P)
    coefficients = [torch.ones(P), dt * A, torch.full((P,), dt)]
    b = torch.zeros(1, 10_000, P)
    b[0, 0] = 1
    y, _ = oscillate(b, *coefficients, backend=backend)
    exact, _ = oscillate(b.double(), *(x.double() for x in coefficients), backend=backend)
    assert (y - exact).abs().max() <= 2e-5 * exact.abs().max()
    assert y[0, -100:].abs().max() > 0.5 * y[0, :100].abs().max()


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
def test_the_kernel_keeps_torchs_rules():
    """Schemas, fake tensors and autograd registration, by torch's own checks."""
    leaves = [x.requires_grad_() for x in make(2, 6, 3, constant=True)]
    options = (torch.rand(2, 6) < 0.2, torch.tensor([6, 2]), True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth takes half a minute
    torch.library.opcheck(torch.ops.zoo.oscillate.default, (*leaves, *options), test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.zeros(2, 5)}, r"b has shape \(2, 5\). Expected shapes: b \(B, T, ..., P\)"),
        ({"q": torch.zeros(2, 5, 4).double()}, r"q has shape \(2, 5, 4\), expected \(4,\)"),
        ({"p": torch.zeros(4, dtype=torch.complex64)}, "p is torch.complex64, expected a floating-point tensor"),
        ({"state": torch.zeros(2, 2, 4).double()}, "state has shape"),
        ({"state": torch.zeros(2, 2, 2, 4)}, "state is torch.float32, expected torch.float64"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    given = dict(zip(("b", "p", "q", "r", "state"), make(2, 5, 4, constant=True), strict=True))
    with pytest.raises(UsageError, match=message) as caught:
        oscillate(**given | changes)
    assert "\n" not in str(caught.value)
