"""slstm: the compiled loop against the float64 step form, in value and in gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import SLSTMState, native, slstm

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
STATE = SLSTMState._fields
COMPILES = pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled kernels: {native.why_not()}")
BACKENDS = ["reference", pytest.param("compiled", marks=COMPILES)]


@dataclass
class Inputs:
    """Inputs of the op as float64 leaves, the first state's among them, and its options."""

    leaves: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def make(T, *, B=3, H=2, D=7, spread=1.0, shift=0.0, packed=False, ragged=False, state=True) -> Inputs:
    """`shift` is added to the input gate's preactivations and taken from the forget gate's."""
    gates = spread * torch.randn(B, T, 4, H, D)
    gates[:, :, 0] += shift
    gates[:, :, 1] -= shift
    leaves = {"gates": gates, "weight": D**-0.5 * torch.randn(H, 4, D, D)}
    if state:
        leaves |= {"h": torch.rand(B, H, D), "c": torch.randn(B, H, D)}
        leaves |= {"n": 1 + torch.rand(B, H, D), "m": torch.randn(B, H, D)}
    options: dict[str, Any] = {}
    if packed:
        options["resets"] = torch.rand(B, T) < 0.1
    if ragged:
        options["lengths"] = torch.tensor([T // 2, T, 0])[:B]
    return Inputs({name: x.bfloat16().double() for name, x in leaves.items()}, options)


def call(leaves: dict[str, torch.Tensor], **options: Any):
    state = SLSTMState(*(leaves[name] for name in STATE)) if "c" in leaves else None
    return slstm(**{name: x for name, x in leaves.items() if name not in STATE}, state=state, **options)


def outcome(inputs: Inputs, dtype=torch.float64, **options) -> dict[str, torch.Tensor]:
    """Outputs, last state, and the gradients of a fixed functional of all."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.leaves.items()}
    h, state = call(leaves, **inputs.options, **options)
    rng, out = torch.Generator().manual_seed(1), [h, *state]
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in out]
    grads = torch.autograd.grad(out, list(leaves.values()), seeds)
    return dict(zip(["outputs", *STATE, *(f"gradient of {name}" for name in leaves)], [*out, *grads], strict=True))


def assert_close(got, expected, dtype):
    for name, b in expected.items():
        a = got[name]
        assert a.shape == b.shape
        error, scale = (a.double() - b.double()).abs().max(), b.double().abs().max().clamp(min=1e-25)
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error} beside {scale}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.crossed("T", "H, D", "state")
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize(("H", "D"), [(3, 33), (1, 5), (2, 16), (4, 64)])
@pytest.mark.parametrize("T", [63, 1, 2, 100])
def test_forms_agree(T, H, D, state, backend):
    inputs = make(T, H=H, D=D, state=state)
    assert_close(outcome(inputs, torch.float32, backend=backend), outcome(inputs, backend="reference"), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0, 200.0])
def test_extreme_gates_stay_exact(shift, spread, backend):
    """From inputs next to nothing, over gates that are shut, to inputs that drown all that was."""
    inputs = make(80, shift=shift, spread=spread)
    exact = outcome(inputs, backend="reference")
    assert all(x.isfinite().all() for x in exact.values())
    assert_close(outcome(inputs, torch.float32, backend=backend), exact, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_input_next_to_nothing_is_still_an_input(backend):
    """From rest m starts at the first input gate, however low: c / n is then 1 times the value."""
    gates = torch.zeros(1, 3, 4, 1, 2)
    gates[:, :, 0], gates[:, :, 2], gates[:, :, 3] = -5000.0, 1.0, 100.0
    h, state = slstm(gates, torch.zeros(1, 4, 2, 2), backend=backend)
    torch.testing.assert_close(h, torch.full_like(h, 1.0).tanh())
    assert all(leaf.isfinite().all() for leaf in state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("packed", "ragged"), [(True, False), (False, True), (True, True)])
def test_forms_agree_on_packed_and_ragged_batches(packed, ragged, backend):
    inputs = make(90, packed=packed, ragged=ragged)
    assert_close(outcome(inputs, torch.float32, backend=backend), outcome(inputs, backend="reference"), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_alone_and_rows_alone(backend):
    leaves = {name: x.float() for name, x in make(60, state=False).leaves.items()}
    resets, lengths = torch.zeros(3, 60, dtype=torch.bool), torch.tensor([60, 33, 0])
    resets[0, 25] = True
    gates = leaves["gates"].masked_fill((torch.arange(60) >= lengths[:, None])[..., None, None, None], torch.nan)
    h, state = slstm(gates, leaves["weight"], lengths=lengths, resets=resets, backend=backend)
    assert h.isfinite().all()
    assert not any(leaf[2].any() for leaf in state)
    for row, start, stop in ((0, 0, 25), (0, 25, 60), (1, 0, 33)):
        alone, last = slstm(leaves["gates"][[row], start:stop], leaves["weight"], backend=backend)
        torch.testing.assert_close(h[[row], start:stop], alone)
        if stop == lengths[row]:
            torch.testing.assert_close([leaf[[row]] for leaf in state], list(last))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_can_be_cut_anywhere(backend):
    leaves = {name: x.float() for name, x in make(50).leaves.items()}
    gates, weight, state = leaves["gates"], leaves["weight"], SLSTMState(*(leaves[name] for name in STATE))
    whole, last = slstm(gates, weight, state, backend=backend)
    pieces = []
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        h, state = slstm(gates[:, start:stop], weight, state, backend=backend)
        pieces.append(h)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_by_finite_differences(packed):
    inputs = make(4, B=2, H=2, D=3, ragged=True)
    if packed:
        inputs.options["resets"] = torch.arange(4).eq(2).expand(2, 4)
    names = list(inputs.leaves)
    leaves = [x.requires_grad_() for x in inputs.leaves.values()]

    def function(*x: torch.Tensor):
        h, state = call(dict(zip(names, x, strict=True)), backend="reference", **inputs.options)
        return h, *state

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(backend, poisoned_memory):
    inputs = make(40, packed=True, ragged=True)
    leaves = {name: x.float() for name, x in inputs.leaves.items()}
    before = {name: x.clone() for name, x in leaves.items()}
    assert all(x.isfinite().all() for x in outcome(inputs, torch.float32, backend=backend).values())
    _, state = call(leaves, **inputs.options, backend=backend)
    for leaf in state:
        leaf.add_(1)
    for name, x in leaves.items():
        assert torch.equal(x, before[name]), name


@COMPILES
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    inputs, before = make(30, B=3, H=2, D=16), torch.get_num_threads()
    expected = outcome(inputs, torch.float32, backend="compiled")
    try:
        torch.set_num_threads(threads)
        assert_close(outcome(inputs, torch.float32, backend="compiled"), expected, torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_do_not_drift(backend):
    """100,000 steps in float32 beside float64: what was rounded long ago is forgotten."""
    inputs = make(100_000, B=1, H=1, D=4, state=False).leaves
    with torch.no_grad():
        exact, _ = call(inputs, backend="reference")
        h, _ = call({name: x.float() for name, x in inputs.items()}, backend=backend)
    assert_close({"outputs": h}, {"outputs": exact}, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "chunked"}, "Unknown backend 'chunked'. .*Available: auto, reference, triton, compiled"),
        ({"backend": "compiled"}, "cannot run here: it computes in float32, the inputs are torch.float64"),
        ({"gates": torch.zeros(3, 5, 14)}, "gates has shape"),
        (
            {"weight": torch.zeros(2, 7, 4, 7)},
            r"weight has shape \(2, 7, 4, 7\), expected \(2, 4, 7, 7\). Shapes: gates",
        ),
        ({"n": torch.zeros(3, 14)}, "state's n has shape"),
        ({"n": torch.zeros(3, 2, 7)}, "state is torch.float32, expected torch.float64"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        call(make(5).leaves | changes)
    assert "\n" not in str(caught.value)
