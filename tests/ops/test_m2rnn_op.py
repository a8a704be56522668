"""m2rnn: the step form against the published loop, the compiled loop against the step form, values and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import m2rnn, native
from zoo.ops._m2rnn import CHUNK

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
COMPILES = pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled kernels: {native.why_not()}")
BACKENDS = ["reference", pytest.param("compiled", marks=COMPILES)]


@dataclass
class Inputs:
    """Inputs of the op as float64 leaves, the first state's among them, and its options."""

    leaves: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def make(T, *, B=3, G=1, H=2, K=5, V=7, spread=1.0, packed=False, ragged=False, clip=None) -> Inputs:
    leaves = {"q": torch.randn(B, T, G, K), "k": spread * torch.randn(B, T, G, K), "v": torch.randn(B, T, H, V)}
    leaves |= {"weight": V**-0.5 * torch.randn(H, V, V), "log_decay": -2 * torch.rand(B, T, H) ** 2}
    leaves["state"] = torch.randn(B, H, K, V)
    options: dict[str, Any] = {"gradient_clipping": clip}
    if packed:
        options["resets"] = torch.rand(B, T) < 0.1
    if ragged:
        options["lengths"] = torch.tensor([T // 2, T, 0])[:B]
    return Inputs({name: x.bfloat16().double() for name, x in leaves.items()}, options)


def outcome(inputs: Inputs, dtype=torch.float64, function=m2rnn, **options) -> dict[str, torch.Tensor]:
    """Outputs, last state, and the gradients of a fixed functional of all."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.leaves.items()}
    out = function(**leaves, **inputs.options, **options)
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in out]
    grads = torch.autograd.grad(out, list(leaves.values()), seeds)
    return dict(zip(["outputs", "last", *(f"gradient of {name}" for name in leaves)], [*out, *grads], strict=True))


def assert_close(got, expected, dtype):
    for name, b in expected.items():
        a = got[name]
        assert a.shape == b.shape
        error, scale = (a.double() - b.double()).abs().max(), b.double().abs().max().clamp(min=1e-25)
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error} beside {scale}"


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clip(-ctx.limit, ctx.limit), None


def published(q, k, v, weight, log_decay, state, gradient_clipping=None):
    """The recurrence of lm-engine's plain form, a head and a row at a time: all states, then all reads."""
    (B, T, H, _), share = v.shape, v.shape[2] // q.shape[2]
    f, outputs, last = log_decay.exp(), torch.empty_like(v), []
    for b in range(B):
        for n in range(H):
            h, states = state[b, n], []
            for t in range(T):
                new = torch.tanh(h @ weight[n] + torch.outer(k[b, t, n // share], v[b, t, n]))
                h = f[b, t, n] * h + (1 - f[b, t, n]) * new
                if gradient_clipping is not None:
                    h = Clip.apply(h, gradient_clipping)
                states.append(h)
            y = [q[b, t, n // share] @ h for t, h in enumerate(states)]
            outputs[b, :, n] = torch.stack(y)
            last.append(h)
    return outputs, torch.stack(last).view_as(state)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize(("G", "H"), [(1, 3), (2, 4), (2, 2)])
def test_equals_the_published_loop(G, H, clip):
    inputs = make(11, B=2, G=G, H=H, clip=clip)
    assert_close(outcome(inputs, backend="reference"), outcome(inputs, function=published), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.crossed("T", "G, H, K, V", "clip")
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize(("G", "H", "K", "V"), [(2, 4, 16, 16), (1, 1, 1, 1), (1, 3, 5, 7), (1, 2, 18, 33)])
@pytest.mark.parametrize("T", [63, 1, CHUNK])
def test_forms_agree(T, G, H, K, V, clip, backend):
    inputs = make(T, G=G, H=H, K=K, V=V, clip=clip)
    assert_close(outcome(inputs, torch.float32, backend=backend), outcome(inputs, backend="reference"), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("packed", "ragged"), [(True, False), (False, True), (True, True)])
def test_forms_agree_on_packed_and_ragged_batches(packed, ragged, backend):
    inputs = make(50, packed=packed, ragged=ragged, clip=0.5)
    assert_close(outcome(inputs, torch.float32, backend=backend), outcome(inputs, backend="reference"), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_inputs_saturate(backend):
    """tanh is 1 to rounding; nothing overflows."""
    inputs = make(20, spread=1e4)
    exact = outcome(inputs, backend="reference")
    got = outcome(inputs, torch.float32, backend=backend)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(
        {name: got[name] for name in ("outputs", "last")}, {n: exact[n] for n in ("outputs", "last")}, torch.float32
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_alone_and_rows_alone(backend):
    leaves = {name: x.float() for name, x in make(40).leaves.items() if name != "state"}
    resets, lengths = torch.zeros(3, 40, dtype=torch.bool), torch.tensor([40, 23, 0])
    resets[0, 25] = True
    padding = torch.arange(40) >= lengths[:, None]
    dirty = {
        name: x if name == "weight" else x.masked_fill(padding.view(3, 40, *[1] * (x.ndim - 2)), torch.nan)
        for name, x in leaves.items()
    }
    y, state = m2rnn(**dirty, lengths=lengths, resets=resets, backend=backend)
    assert y.isfinite().all()
    assert not y[padding].any()
    assert not state[2].any()
    for row, start, stop in ((0, 0, 25), (0, 25, 40), (1, 0, 23)):
        part = {name: x if name == "weight" else x[[row], start:stop] for name, x in leaves.items()}
        alone, last = m2rnn(**part, backend=backend)
        torch.testing.assert_close(y[[row], start:stop], alone)
        if stop == lengths[row]:
            torch.testing.assert_close(state[[row]], last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_can_be_cut_anywhere(backend):
    leaves = {name: x.float() for name, x in make(50).leaves.items()}
    whole, last = m2rnn(**leaves, backend=backend)
    state, weight, pieces = leaves.pop("state"), leaves.pop("weight"), []
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        part = {name: x[:, start:stop] for name, x in leaves.items()}
        y, state = m2rnn(**part, weight=weight, state=state, backend=backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


def test_gradients_by_finite_differences():
    inputs = make(5, B=2, K=3, V=2, packed=True, ragged=True)
    names, leaves = list(inputs.leaves), [x.requires_grad_() for x in inputs.leaves.values()]
    torch.autograd.gradcheck(lambda *x: m2rnn(**dict(zip(names, x, strict=True)), **inputs.options), leaves)


@COMPILES
def test_second_derivatives_of_the_compiled_loop():
    inputs, found = make(20, packed=True), {}
    for backend, dtype in (("compiled", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.leaves.items()}
        y, _ = m2rnn(**leaves, **inputs.options, backend=backend)
        grads = torch.autograd.grad(y.sin().sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))
        found[backend] = dict(zip(leaves, second, strict=True))
    assert_close(found["compiled"], found["reference"], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cut_gradients_have_no_second_derivatives(backend):
    leaves = {name: x.float().requires_grad_() for name, x in make(5).leaves.items()}
    y, _ = m2rnn(**leaves, gradient_clipping=1.0, backend=backend)
    (g,) = torch.autograd.grad(y.sum(), leaves["q"], retain_graph=True)
    assert g.any()
    with pytest.raises(UsageError, match=r"m2rnn: gradient_clipping= cuts gradients: .*no second derivatives"):
        torch.autograd.grad(y.sum(), leaves["q"], create_graph=True)
    with pytest.raises(UsageError, match="m2rnn: gradient_clipping= cuts gradients, which forward-mode"):
        torch.func.grad(lambda q: m2rnn(**leaves | {"q": q}, gradient_clipping=1.0)[0].sum())(leaves["q"])


@COMPILES
def test_few_states_are_kept_for_the_backward_pass():
    """Beside the inputs, one state for every CHUNK steps: memory grows with T, and slowly."""
    sizes = {}
    for T in (CHUNK, 10 * CHUNK):
        leaves = {name: x.float().requires_grad_() for name, x in make(T, B=1, H=1, K=64, V=64).leaves.items()}
        held: dict[int, int] = {}

        def pack(x, held=held):
            held[x.untyped_storage().data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            m2rnn(**leaves, backend="compiled")
        sizes[T] = sum(held.values())
    state = 64 * 64
    assert sizes[10 * CHUNK] - sizes[CHUNK] < 9 * state + 9 * CHUNK * 8 * 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(backend, poisoned_memory):
    inputs = make(40, packed=True, ragged=True)
    leaves = {name: x.float() for name, x in inputs.leaves.items()}
    before = {name: x.clone() for name, x in leaves.items()}
    assert all(x.isfinite().all() for x in outcome(inputs, torch.float32, backend=backend).values())
    _, state = m2rnn(**leaves, **inputs.options, backend=backend)
    state.add_(1)
    for name, x in leaves.items():
        assert torch.equal(x, before[name]), name


@COMPILES
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    inputs, before = make(30, B=1, G=1, H=3, K=8, V=16), torch.get_num_threads()
    expected = outcome(inputs, torch.float32, backend="compiled")
    try:
        torch.set_num_threads(threads)
        assert_close(outcome(inputs, torch.float32, backend="compiled"), expected, torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_that_hardly_opens_still_writes(backend):
    """1 - f at log f = -1e-9 is 1e-9, though f is 1 in float32."""
    ones = torch.ones(1, 1, 1, 1)
    y, _ = m2rnn(ones, ones, ones, torch.zeros(1, 1, 1), torch.full((1, 1, 1), -1e-9), backend=backend)
    assert math.isclose(y.item(), 1e-9 * math.tanh(1), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "chunked"}, "Unknown backend 'chunked'. .*Available: auto, reference, triton, compiled"),
        ({"backend": "compiled"}, "cannot run here: it computes in float32, the inputs are torch.float64"),
        ({"q": torch.zeros(3, 5, 5)}, r"m2rnn: q \(3, 5, 5\) and v \(3, 5, 2, 7\) do not go together"),
        ({"q": torch.zeros(3, 5, 3, 5)}, "do not go together"),
        ({"weight": torch.zeros(2, 7, 5)}, r"weight has shape \(2, 7, 5\), expected \(2, 7, 7\). Shapes: q"),
        ({"state": torch.zeros(3, 2, 5, 7)}, "state is torch.float32, expected torch.float64"),
        ({"log_decay": torch.zeros(3, 5)}, "log_decay has shape"),
        ({"gradient_clipping": 0.0}, "gradient_clipping=0.0 is not allowed: it should be above 0, or None"),
        ({"gradient_clipping": math.nan}, "gradient_clipping=nan is not allowed"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        m2rnn(**make(5).leaves | changes)
    assert "\n" not in str(caught.value)
