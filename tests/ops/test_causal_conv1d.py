"""causal_conv1d: both forms against torch's own convolution and each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.core.errors import UsageError
from zoo.ops import causal_conv1d, native

PLAIN = ["reference", "chunked"]
BACKENDS = PLAIN if native.why_not() else [*PLAIN, "compiled"]


def make(T, *, B=3, D=5, W=4, backend=None):
    x, weight, bias, state = torch.randn(B, T, D), torch.randn(D, W), torch.randn(D), torch.randn(B, W - 1, D)
    dtype = torch.float32 if backend == "compiled" else torch.float64
    return [t.bfloat16().to(dtype) for t in (x, weight, bias, state)]


def outcome(inputs, op=causal_conv1d, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, state = op(*leaves, **options)
    rng = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=rng).to(t.dtype)).sum() for t in (y, state))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [y, state, *grads]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_is_torchs_convolution(backend, activation, W):
    x, weight, bias, state = make(20, W=W, backend=backend)
    y, last = causal_conv1d(x, weight, bias, state, activation=activation, backend=backend)
    window = torch.cat([state, x], 1)
    expected = F.conv1d(window.mT, weight[:, None], bias, groups=5).mT
    torch.testing.assert_close(y, F.silu(expected) if activation else expected)
    torch.testing.assert_close(last, window[:, 20:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize(("T", "D"), [(1, 5), (2, 16), (3, 5), (63, 40), (100, 33)])
def test_forms_agree(T, D, W, ragged, packed):
    options = {"activation": "silu"}
    if packed:
        options["resets"] = torch.rand(3, T) < 0.3
    if ragged:
        options["lengths"] = torch.tensor([T, T // 2, 0])
    inputs = make(T, D=D, W=W)
    exact = outcome(inputs, backend="reference", **options)
    fast = [("chunked", torch.float64, 1e-9), *((form, torch.float32, 2e-5) for form in BACKENDS[1:])]
    for form, dtype, tolerance in fast:
        got = outcome([x.to(dtype) for x in inputs], backend=form, **options)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    x, weight, bias, state = make(30)
    expected, last = causal_conv1d(x, weight, bias, state)
    y, kept = causal_conv1d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), state.float(), backend=backend)
    assert y.dtype == torch.bfloat16
    assert kept.dtype == torch.float32
    assert (y - expected).abs().max() < 2e-2 * expected.abs().max()
    torch.testing.assert_close(kept.double(), last.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_row_is_its_documents_alone(backend):
    x, weight, bias, state = make(20, B=1, backend=backend)
    resets = torch.zeros(1, 20, dtype=torch.bool)
    resets[:, [2, 9, 18]] = True
    y, last = causal_conv1d(x, weight, bias, state, resets=resets, backend=backend)
    torch.testing.assert_close(y[:, :2], causal_conv1d(x[:, :2], weight, bias, state)[0])
    for start, stop in ((2, 9), (9, 18), (18, 20)):
        alone, kept = causal_conv1d(x[:, start:stop], weight, bias)
        torch.testing.assert_close(y[:, start:stop], alone)
    torch.testing.assert_close(last, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_row_is_the_row_alone(backend):
    x, weight, bias, state = make(20, backend=backend)
    lengths = torch.tensor([20, 2, 0])
    x = x.masked_fill((torch.arange(20) >= lengths[:, None])[..., None], torch.nan)
    y, last = causal_conv1d(x, weight, bias, state, lengths=lengths, backend=backend)
    assert y.isfinite().all()
    torch.testing.assert_close(last[2], state[2])
    for row in range(2):
        alone, kept = causal_conv1d(x[row : row + 1, : lengths[row]], weight, bias, state[row : row + 1])
        torch.testing.assert_close(y[row : row + 1, : lengths[row]], alone)
        torch.testing.assert_close(last[row : row + 1], kept)


def test_a_sequence_can_be_cut_anywhere():
    x, weight, bias, state = make(30)
    whole, last = causal_conv1d(x, weight, bias, state)
    pieces = []
    for start, stop in ((0, 1), (1, 3), (3, 29), (29, 30)):
        y, state = causal_conv1d(x[:, start:stop], weight, bias, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", PLAIN)
def test_gradients_by_finite_differences(backend):
    inputs = [x.requires_grad_() for x in make(6, B=2, D=2, W=3)]
    resets = torch.tensor([[False, False, True, False, False, False], [False] * 6])
    torch.autograd.gradcheck(lambda *x: causal_conv1d(*x, activation="silu", resets=resets, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(backend, poisoned_memory):
    inputs = make(30, backend=backend)
    before = [x.clone() for x in inputs]
    options = {"resets": torch.rand(3, 30) < 0.1, "lengths": torch.tensor([30, 4, 0]), "backend": backend}
    assert all(x.isfinite().all() for x in outcome(inputs, **options))
    _, state = causal_conv1d(*inputs, **options)
    state.add_(1)
    _, state = causal_conv1d(inputs[0][:, :1], *inputs[1:], backend=backend)
    state.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiles_to_one_graph(backend):
    inputs = make(30, backend=backend)
    options = {"resets": torch.rand(3, 30) < 0.1, "lengths": torch.tensor([30, 4, 0]), "activation": "silu"}
    expected = outcome(inputs, backend=backend, **options)
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    for a, b in zip(outcome(inputs, backend=backend, op=compiled, **options), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif("compiled" not in BACKENDS, reason="no kernels here")
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("W", [4, 40])
def test_compiled_over_slices_threads_and_wide_windows(W, threads):
    """x a slice of wider rows, its channels cut between threads; the window wider than a stretch of steps."""
    inputs = make(100, B=1, D=70, W=W)
    resets = torch.rand(1, 100) < 0.02
    exact = outcome(inputs, backend="reference", activation="silu", resets=resets)
    singles = [x.float() for x in inputs]
    singles[0] = torch.cat([singles[0], singles[0]], -1)[..., :70]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = outcome(singles, backend="compiled", activation="silu", resets=resets)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, exact, strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "silo"}, "Unknown activation 'silo'. Did you mean 'silu'?"),
        ({"backend": "cuda"}, "Unknown backend 'cuda'"),
        ({"weight": torch.zeros(6, 4)}, r"weight has shape \(6, 4\), expected \(5, 4\). Shapes: x \(B, T, D\)"),
        ({"weight": torch.zeros(5)}, "Expected shapes"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"state": torch.zeros(3, 4, 5)}, "state has shape"),
        ({"state": torch.zeros(3, 3, 5)}, "state is torch.float32"),
        ({"x": torch.zeros(3, 7, 5, dtype=torch.long)}, "x is torch.int64"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    inputs = dict(zip(("x", "weight", "bias", "state"), make(7), strict=True))
    with pytest.raises(UsageError, match=message):
        causal_conv1d(**(inputs | changes))
