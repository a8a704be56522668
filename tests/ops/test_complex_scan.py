"""scan of complex numbers, and with one a for all steps: every form against the float64 step form."""

from __future__ import annotations

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import native, scan

COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}"),
)
FAST = pytest.mark.parametrize("backend", ["chunked", COMPILED])
FORMS = pytest.mark.parametrize("backend", ["reference", "chunked", COMPILED])
TOLERANCE = {torch.complex128: 1e-12, torch.float64: 1e-12, torch.complex64: 2e-5, torch.float32: 2e-5}
NARROW = {torch.complex128: torch.complex64, torch.float64: torch.float32}


def make(B, T, D, dtype=torch.complex128, constant=False):
    """a (B, T, D) or (D) within the unit circle, b and a state."""
    a = torch.randn(*(() if constant else (B, T)), D, dtype=dtype)
    a = a / a.abs() * torch.rand(a.shape, dtype=torch.float64)
    return a, torch.randn(B, T, D, dtype=dtype), torch.randn(B, D, dtype=dtype)


def outcome(leaves, dtype, **options):
    """Outputs, last state, the gradients of a fixed functional of both, and a product with its second derivatives."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
    out = scan(*leaves, **options)
    rng = torch.Generator().manual_seed(1)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    seeds = [torch.randn(x.shape, generator=rng, dtype=wide).to(dtype) for x in out]
    grads = torch.autograd.grad(out, leaves, seeds, create_graph=True)
    again = torch.autograd.grad(
        sum((g * g.conj()).real.sum() for g in grads), leaves, allow_unused=True, materialize_grads=True
    )
    assert all(x.dtype == dtype for x in (*out, *grads, *again))
    return [x.detach() for x in (*out, *grads, *again)]


def worst(got, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))


@FAST
@pytest.mark.crossed("T", "packed")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "constant"), [(torch.complex128, False), (torch.complex128, True), (torch.float64, True)]
)
@pytest.mark.parametrize("T", [33, 1, 2, 100])
def test_forms_agree(T, dtype, constant, packed, backend):
    """In value, gradient and second derivative; with documents and padding too."""
    leaves, options = make(3, T, 70, dtype, constant), {}
    if packed:
        options = {"resets": torch.rand(3, T) < 0.2, "lengths": torch.tensor([T, T - T // 2, T])}
    exact = outcome(leaves, dtype, backend="reference", **options)
    for other in (dtype, NARROW[dtype]):
        assert worst(outcome(leaves, other, backend=backend, **options), exact) <= TOLERANCE[other]


@FORMS
def test_the_definition(backend):
    """Two steps of one channel, and their gradients by the rules of real and imaginary parts."""
    a, b, h = make(1, 2, 1)
    parts = [p.clone().requires_grad_() for x in (a, b, h) for p in (x.real, x.imag)]
    a, b, h = (torch.complex(*parts[i : i + 2]) for i in (0, 2, 4))
    first = a[:, 0] * h + b[:, 0]
    second = a[:, 1] * first + b[:, 1]
    got, last = scan(a, b, h, backend=backend)
    torch.testing.assert_close(got, torch.stack([first, second], 1))
    torch.testing.assert_close(last, second)
    expected = torch.autograd.grad(second.real.sum() + 2 * first.imag.sum(), parts, retain_graph=True)
    actual = torch.autograd.grad(last.real.sum() + 2 * got[:, 0].imag.sum(), parts)
    torch.testing.assert_close(actual, expected)


@FORMS
@pytest.mark.parametrize("constant", [False, True])
def test_derivatives_by_finite_differences(constant, backend):
    leaves = [x.requires_grad_() for x in make(2, 4, 1, constant=constant)]
    resets, lengths = torch.arange(4).expand(2, 4) == 2, torch.tensor([4, 3])

    def run(*x):
        return scan(*x, resets=resets, lengths=lengths, chunk_size=2, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@FORMS
def test_transforms_of_torch_func(backend):
    """They take the reference; another form is refused by name."""
    a, b, h = make(2, 6, 3)
    if backend != "reference":
        with pytest.raises(UsageError, match=r"scan: backend='\w+' does not serve forward-mode"):
            torch.func.vmap(lambda b: scan(a[0, 0], b[None], backend=backend)[0])(b)
        return
    rows = torch.func.vmap(lambda b, h: scan(a[0, 0], b[None], h[None])[0][0])(b, h)
    torch.testing.assert_close(rows, scan(a[0, 0], b, h)[0])
    tangent = torch.randn_like(a)
    _, along = torch.func.jvp(lambda a: scan(a, b, h)[0], (a,), (tangent,))
    step = 1e-6
    slope = (scan(a + step * tangent, b, h)[0] - scan(a - step * tangent, b, h)[0]) / (2 * step)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-7)


@FORMS
@torch.no_grad()
def test_conjugates_and_mixed_types(backend):
    """Torch marks conjugates and negated imaginary parts on the tensor alone; a real a, or b, counts as complex."""
    a, b, h = make(2, 5, 4)
    expected = scan(a.conj().resolve_conj(), b.conj().resolve_conj(), h, backend=backend)[0]
    torch.testing.assert_close(scan(a.conj(), b.conj(), h, backend=backend)[0], expected)
    negated = a[:1, :1, :1].conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(scan(negated, negated, backend=backend)[0], -a[:1, :1, :1].imag)
    real = scan(a.abs(), b, h, backend=backend)[0]
    torch.testing.assert_close(real, scan(a.abs().to(b.dtype), b, h, backend=backend)[0])
    turned = scan(a, b.real, h, backend=backend)[0]
    torch.testing.assert_close(turned, scan(a, b.real.to(b.dtype), h, backend=backend)[0])
    assert turned.dtype == torch.complex128


@FORMS
@torch.no_grad()
@pytest.mark.parametrize("constant", [False, True])
def test_a_sequence_can_be_cut_and_rows_are_alone(constant, backend):
    a, b, h = make(3, 70, 5, constant=constant)
    lengths = torch.tensor([70, 33, 0])
    padding = (torch.arange(70) >= lengths[:, None])[..., None]
    whole, last = scan(
        a if constant else a.masked_fill(padding, torch.nan),
        b.masked_fill(padding, torch.nan),
        h,
        lengths=lengths,
        backend=backend,
    )
    assert not whole.masked_select(padding.expand_as(whole)).any()
    torch.testing.assert_close(last[2], h[2])
    for row, n in ((0, 70), (1, 33)):
        state, pieces = h[row : row + 1], []
        for start, stop in ((0, 1), (1, 20), (20, n)):
            part = a if constant else a[row : row + 1, start:stop]
            y, state = scan(part, b[row : row + 1, start:stop], state, backend=backend)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole[row : row + 1, :n])
        torch.testing.assert_close(state, last[row : row + 1])


@FAST
def test_decays_near_one_stay_exact(backend):
    """20,000 steps in complex64, which turn and forget in 100 to 100,000 steps."""
    T, D = 20_000, 4
    a = torch.polar(torch.exp(-torch.logspace(-5, -2, D).double()), torch.rand(D).double())
    a = a.to(torch.complex64).to(torch.complex128)
    b, h = torch.randn(1, T, D, dtype=torch.complex64).to(torch.complex128), torch.zeros(1, D, dtype=torch.complex128)
    exact = outcome([a, b, h], torch.complex128, backend=backend)[:5]
    assert worst(outcome([a, b, h], torch.complex64, backend=backend)[:5], exact) <= 2e-5


@FAST
@pytest.mark.parametrize("constant", [False, True])
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(constant, backend, poisoned_memory):
    leaves = make(3, 40, 19, constant=constant)
    before = [x.clone() for x in leaves]
    options = {"resets": torch.rand(3, 40) < 0.1, "lengths": torch.tensor([0, 17, 40])}
    assert all(x.isfinite().all() for x in outcome(leaves, torch.complex64, backend=backend, **options))
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True))


@pytest.mark.parametrize("backend", [pytest.param("chunked", marks=pytest.mark.slow), COMPILED])  # it takes a second
@pytest.mark.parametrize("constant", [False, True])
def test_compiles_to_one_graph(constant, backend):
    leaves = make(2, 6, 3, constant=constant)
    options = {"resets": torch.rand(2, 6) < 0.3, "lengths": torch.tensor([6, 3]), "chunk_size": 2, "backend": backend}

    def run(function):
        held = [x.to(torch.complex64).requires_grad_() for x in leaves]
        y, last = function(*held, **options)
        return [y, last, *torch.autograd.grad(torch.view_as_real(y).sum() + last.abs().sum(), held)]

    expected = run(scan)
    torch._dynamo.reset()
    got = run(torch.compile(scan, fullgraph=True, backend="aot_eager"))
    assert worst(got, expected) <= 2e-5


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
def test_the_kernel_keeps_torchs_rules():
    """Schemas, fake tensors and autograd registration, by torch's own checks."""
    leaves = [x.requires_grad_() for x in make(2, 6, 3, constant=True)]
    torch.library.opcheck(torch.ops.zoo.scan.default, (*leaves, torch.rand(2, 6) < 0.2, torch.tensor([6, 2])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"a": torch.zeros(3, dtype=torch.complex64)},
            r"a has shape \(3,\), expected \(2, 5, 4\) or \(4,\). Shapes: a",
        ),
        ({"a": torch.zeros(4, dtype=torch.long)}, "a is torch.int64, expected a floating-point or complex tensor"),
        (
            {"state": torch.zeros(2, 4).double()},
            "state is torch.float64, expected torch.complex128: complex as the inputs",
        ),
        ({"b": torch.zeros(2, 5, 4), "state": None, "backend": "fla"}, "Unknown backend 'fla'"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    a, b, h = make(2, 5, 4, constant=True)
    with pytest.raises(UsageError, match=message) as caught:
        scan(**{"a": a, "b": b, "state": h} | changes)
    assert "\n" not in str(caught.value)
