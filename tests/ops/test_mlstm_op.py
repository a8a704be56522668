"""mlstm: every form against the float64 step form, in value and in gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from zoo.core.errors import UsageError
from zoo.ops import MLSTMState, mlstm, native

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}
COMPILES = pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled kernels: {native.why_not()}")
FORMS = [
    ("chunked", torch.float64),
    ("chunked", torch.float32),
    pytest.param("compiled", torch.float32, marks=COMPILES),
]
BACKENDS = ["reference", "chunked", pytest.param("compiled", marks=COMPILES)]
STATE = ("C", "n", "m")


@dataclass
class Inputs:
    """Inputs of the op as float64 leaves, the first state's among them, and its options."""

    leaves: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def make(T, *, B=2, G=2, H=4, K=7, V=10, gates="mild", packed=False, ragged=False, state=True) -> Inputs:
    """Positive q, k and n: the normaliser is then no small difference of large numbers."""
    log_i, log_f = gates_of(gates, B, T, H)
    leaves = {"q": torch.rand(B, T, G, K) + 0.1, "k": torch.rand(B, T, G, K) + 0.1, "v": torch.randn(B, T, H, V)}
    leaves |= {"log_i": log_i, "log_f": log_f}
    if state:
        leaves |= {"C": torch.randn(B, H, K, V), "n": torch.rand(B, H, K) + 0.1, "m": torch.randn(B, H)}
    options: dict[str, Any] = {}
    if packed:
        options["resets"] = torch.rand(B, T) < 0.1
    if ragged:
        options["lengths"] = torch.tensor([T // 2, T, 0, 1])[:B]
    return Inputs({name: x.bfloat16().double() for name, x in leaves.items()}, options)


def gates_of(kind: str, B: int, T: int, H: int) -> tuple[torch.Tensor, torch.Tensor]:
    log_i, log_f = torch.randn(B, T, H), F.logsigmoid(torch.randn(B, T, H) + 3)
    match kind:
        case "mild":
            pass
        case "shut":  # of the past, a step sees e^-50
            log_f = torch.full((B, T, H), -50.0)
        case "closed":  # sums of -3200 over a chunk, and inputs far below 1
            log_i, log_f = log_i - 50, log_f - 50
        case "open":
            log_i = log_i + 50
        case "wide":  # from -50 to 50 and beyond
            log_i = 40 * log_i
        case "fall":  # a single step of -5000
            log_f[:, T // 2] = -5000.0
        case "exponential":  # a forget gate above 1
            log_f = 0.5 * torch.randn(B, T, H)
        case "dead":  # fully shut at some steps: the forget gate, the input gate, both, and all that follows
            log_f[:, ::5], log_i[:, ::7] = -torch.inf, -torch.inf
            log_f[:, -2:, 1], log_i[:, -2:, 1] = -torch.inf, -torch.inf
        case "low":  # m below zero, and exp(-m) far above what float32 holds
            log_i, log_f = log_i - 500, log_f - 10
        case _:
            raise AssertionError(kind)
    return log_i, log_f


def call(leaves: dict[str, torch.Tensor], **options: Any):
    state = MLSTMState(*(leaves[name] for name in STATE)) if "C" in leaves else None
    return mlstm(**{name: x for name, x in leaves.items() if name not in STATE}, state=state, **options)


def outcome(inputs: Inputs, dtype=torch.float64, **options) -> dict[str, torch.Tensor]:
    """Output, last state, and the gradients of a fixed functional of all."""
    state_dtype = torch.promote_types(torch.float32, dtype)
    leaves = {
        name: x.to(state_dtype if name in STATE else dtype, copy=True).requires_grad_()
        for name, x in inputs.leaves.items()
    }
    h, state = call(leaves, **inputs.options, **options)
    assert h.dtype == dtype
    assert all(leaf.dtype == state_dtype for leaf in state)
    rng, out = torch.Generator().manual_seed(1), [h, *state]
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in out]
    grads = torch.autograd.grad(out, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
    return dict(zip(["h", *STATE, *(f"gradient of {name}" for name in leaves)], [*out, *grads], strict=True))


@functools.lru_cache(maxsize=2)  # the forms of a problem are tested one after the other
def problem(T, **how: Any) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """Inputs, and the outcome of the step form."""
    inputs = make(T, **how)
    return inputs, outcome(inputs, backend="reference")


def assert_close(got, expected, dtype, floor=1e-25):
    """Relative to the largest entry, or to `floor`: what is smaller than that is next to nothing in float32."""
    for name, b in expected.items():
        a = got[name]
        assert a.shape == b.shape
        error, scale = (a.double() - b.double()).abs().max(), b.double().abs().max().clamp(min=floor)
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error} beside {scale}"


@pytest.mark.parametrize(("backend", "dtype"), FORMS)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 100, 300])
def test_forms_agree(T, backend, dtype):
    inputs, exact = problem(T)
    assert_close(outcome(inputs, dtype, backend=backend), exact, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), FORMS)
def test_forms_agree_from_rest_over_a_thousand_steps(backend, dtype):
    inputs = make(1000, B=1, state=False)
    assert_close(outcome(inputs, dtype, backend=backend), outcome(inputs, backend="reference"), dtype)


@pytest.mark.parametrize(("backend", "dtype"), [*FORMS, ("reference", torch.float32)])
@pytest.mark.parametrize("gates", ["shut", "closed", "open", "wide", "fall", "exponential", "low", "dead"])
def test_extreme_gates_stay_exact(gates, backend, dtype):
    """The gradients of gates that are shut are themselves tiny, and must come out right to the same relative error."""
    inputs, exact = problem(130, gates=gates)
    assert all(x.isfinite().all() for x in exact.values())
    assert_close(outcome(inputs, dtype, backend=backend), exact, dtype)


@pytest.mark.parametrize(("backend", "dtype"), FORMS)
@pytest.mark.crossed("packed, ragged", "gates")
@pytest.mark.parametrize("gates", ["mild", "wide", "fall", "dead"])
@pytest.mark.parametrize(("packed", "ragged"), [(True, True), (True, False), (False, True)])
def test_forms_agree_on_packed_and_ragged_batches(packed, ragged, gates, backend, dtype):
    inputs, exact = problem(90, B=4, gates=gates, packed=packed, ragged=ragged)
    assert_close(outcome(inputs, dtype, backend=backend), exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_inputs(backend):
    inputs = make(100)
    assert_close(outcome(inputs, torch.bfloat16, backend=backend), outcome(inputs, backend="reference"), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_row_is_its_documents_alone(backend):
    inputs = make(100, B=1, state=False, gates="wide")
    leaves = {name: x.float() for name, x in inputs.leaves.items()}
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[:, [0, 37, 64]] = True
    whole, last = call(leaves, resets=resets, backend=backend)
    for start, stop in ((0, 37), (37, 64), (64, 100)):
        alone, state = call({name: x[:, start:stop] for name, x in leaves.items()}, backend=backend)
        torch.testing.assert_close(whole[:, start:stop], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_row_is_the_row_alone(backend):
    leaves = {name: x.float() for name, x in make(70, B=3).leaves.items()}
    lengths = torch.tensor([70, 33, 0])
    padding = torch.arange(70) >= lengths[:, None]
    poisoned = {  # whatever the padding holds
        name: x if name in STATE else x.masked_fill(padding.view(3, 70, *[1] * (x.ndim - 2)), torch.nan)
        for name, x in leaves.items()
    }
    h, state = call(poisoned, lengths=lengths, backend=backend)
    assert h.isfinite().all()
    for row, n in enumerate(lengths.tolist()):
        alone = {k: x[row : row + 1] if k in STATE else x[row : row + 1, :n] for k, x in leaves.items()}
        if not n:
            torch.testing.assert_close([leaf[row:] for leaf in state], [alone[name] for name in STATE])
            continue
        expected, last = call(alone, backend=backend)
        torch.testing.assert_close(h[row : row + 1, :n], expected)
        torch.testing.assert_close([leaf[row : row + 1] for leaf in state], list(last))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", ["mild", "wide", "low", "dead"])
def test_a_sequence_can_be_cut_anywhere(gates, backend):
    dtype = torch.float32 if backend == "compiled" else torch.float64
    leaves = {name: x.to(dtype) for name, x in make(150, gates=gates).leaves.items()}
    state = MLSTMState(*(leaves.pop(name) for name in STATE))
    whole, last = mlstm(**leaves, state=state, backend=backend)
    pieces = []
    for start, stop in ((0, 1), (1, 66), (66, 149), (149, 150)):
        h, state = mlstm(**{name: x[:, start:stop] for name, x in leaves.items()}, state=state, backend=backend)
        pieces.append(h)
    got = {"h": torch.cat(pieces, 1), **state._asdict()}
    assert_close(got, {"h": whole, **last._asdict()}, dtype)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("gates", ["mild", "wide", "exponential"])
def test_gradients_by_finite_differences(gates, backend):
    inputs = make(5, B=1, G=1, H=2, K=2, V=3, gates=gates)
    if gates == "mild":
        inputs.options["resets"] = torch.arange(5).eq(2).expand(1, 5)
    if gates == "wide":
        inputs.leaves["log_i"] /= 10  # finite differences are not that exact
    names = list(inputs.leaves)
    leaves = [x.requires_grad_() for x in inputs.leaves.values()]

    def function(*x: torch.Tensor):
        h, state = call(dict(zip(names, x, strict=True)), chunk_size=3, backend=backend, eps=0.1, **inputs.options)
        return h, *state

    torch.autograd.gradcheck(function, leaves)


def test_the_definition():
    """Two steps written out in full, gates not in logarithms."""
    inputs = make(2, B=1, G=1, H=1).leaves
    C, n = (inputs[name][0, 0] * inputs["m"][0, 0].exp() for name in ("C", "n"))
    for t in range(2):
        q, k, v = (inputs[name][0, t, 0] for name in ("q", "k", "v"))
        i, f = inputs["log_i"][0, t, 0].exp(), inputs["log_f"][0, t, 0].exp()
        C, n, q = f * C + i * torch.outer(k, v), f * n + i * k, q * len(q) ** -0.5
        expected = C.T @ q / torch.clamp((n @ q).abs(), min=1)
    for backend in ("reference", "chunked"):
        h, state = call(inputs, eps=0.0, backend=backend)
        torch.testing.assert_close(h[0, 1, 0], expected)
        torch.testing.assert_close(state.C[0, 0] * state.m.exp(), C)
        torch.testing.assert_close(state.n[0, 0] * state.m[0, 0].exp(), n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(backend, poisoned_memory):
    inputs = make(70, packed=True, ragged=True)
    leaves = {name: x.float() for name, x in inputs.leaves.items()}
    before = {name: x.clone() for name, x in leaves.items()}
    assert all(x.isfinite().all() for x in outcome(inputs, torch.float32, backend=backend).values())
    _, state = call(leaves, **inputs.options, backend=backend)
    for leaf in state:
        leaf.add_(1)
    for name, x in leaves.items():
        assert torch.equal(x, before[name]), name


# plain forms are traced step by step: seconds each
TRACED = [b if b not in ("reference", "chunked") else pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS]


@pytest.mark.parametrize("backend", TRACED)
def test_compiles_to_one_graph(backend):
    inputs = make(20, packed=True, ragged=True)
    expected = outcome(inputs, torch.float32, chunk_size=8, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = {name: x.float().requires_grad_() for name, x in inputs.leaves.items()}
    h, state = compiled(leaves, **inputs.options, chunk_size=8, backend=backend)
    assert_close({"h": h, **state._asdict()}, {name: expected[name] for name in ("h", *STATE)}, torch.float32)
    (h.sum() + sum(leaf.sum() for leaf in state)).backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 48, 200])
def test_any_chunk_size_gives_the_same(chunk_size):
    inputs = make(50, packed=True)
    assert_close(
        outcome(inputs, chunk_size=chunk_size, backend="chunked"), outcome(inputs, backend="reference"), torch.float64
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_many_steps_stay_exact(backend):
    """65,536 steps in float32 beside float64, in value and gradient."""
    inputs = make(65_536, B=1, G=1, H=1, K=8, V=8, state=False)
    inputs.leaves["log_f"] /= 20  # a memory of about a thousand steps
    exact = outcome(inputs, backend="chunked")
    assert_close(outcome(inputs, torch.float32, backend=backend), exact, torch.float32)


@pytest.mark.slow
def test_the_step_form_does_not_drift():
    """100,000 single steps: the error at the end is that at the start."""
    inputs = make(100_000, B=1, G=1, H=1, K=4, V=4, state=False).leaves
    inputs["log_f"] /= 100
    exact, last = call(inputs, backend="chunked")
    with torch.no_grad():
        h, state = [], None
        for start in range(0, 100_000, 1000):
            part = {name: x[:, start : start + 1000].float() for name, x in inputs.items()}
            y, state = mlstm(**part, state=state, backend="reference")
            h.append(y)
    got = {"h": torch.cat(h, 1), **state._asdict()}
    assert_close(got, {"h": exact, **last._asdict()}, torch.float32)


def test_auto_takes_the_best_form_and_a_name_is_never_replaced(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "off")
    leaves = {name: x.float() for name, x in make(20).leaves.items()}
    call(leaves)
    with pytest.raises(UsageError, match="backend='compiled' cannot run here: switched off by ZOO_KERNELS"):
        call(leaves, backend="compiled")


def good(**changes):
    return make(5).leaves | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "chunk"}, "Unknown backend 'chunk'. Did you mean 'chunked'?"),
        ({"v": torch.zeros(2, 5, 3, 10)}, "do not go together"),
        ({"log_i": torch.zeros(2, 5)}, "log_i has shape"),
        ({"log_f": torch.zeros(2, 5, 4, 1)}, r"log_f has shape \(2, 5, 4, 1\), expected \(2, 5, 4\). Shapes: q, k"),
        ({"C": torch.zeros(2, 4, 10, 7)}, "state has shape"),
        ({"n": torch.zeros(2, 4, 10)}, "state's n has shape"),
        ({"m": torch.zeros(2, 4, 1)}, "state's m has shape"),
        ({"m": torch.zeros(2, 4)}, "state is torch.float32, expected torch.float64"),
        ({"log_i": torch.zeros(2, 5, 4, dtype=torch.long)}, "log_i is torch.int64, expected a floating-point tensor"),
        ({"chunk_size": 0}, "chunk_size=0 is not allowed"),
        ({"backend": "compiled"}, "cannot run here: it computes in float32, the inputs are torch.float64"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        call(good(**changes))
    assert "\n" not in str(caught.value)
