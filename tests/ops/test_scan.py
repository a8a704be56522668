"""scan and selective_scan: every form against the float64 step form, in value and in gradient."""

from __future__ import annotations

import functools
import resource
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import native, scan, selective_scan

OPS = [scan, selective_scan]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}
COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}"),
)
FAST = pytest.mark.parametrize("backend", ["chunked", COMPILED])
FORMS = pytest.mark.parametrize("backend", ["reference", "chunked", COMPILED])
TRACED = [pytest.param("chunked", marks=pytest.mark.slow), COMPILED]  # the plain form takes seconds
BOTH = pytest.mark.parametrize("op", OPS)


@dataclass
class Inputs:
    """Inputs of an op as float64 leaves, and its options."""

    leaves: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def make(op, T, *, B=2, D=19, N=5, decay="mild", packed=False, ragged=False) -> Inputs:
    options: dict[str, Any] = {}
    if op is scan:
        leaves = {"a": log_decays(decay, B, T, D).exp(), "b": torch.randn(B, T, D), "state": torch.randn(B, D)}
    else:
        leaves = {
            "u": torch.randn(B, T, D),
            "delta": inverse_softplus(-log_decays(decay, B, T, D)),
            "A": -torch.arange(1.0, N + 1).expand(D, N) * (0.5 + torch.rand(D, 1)),
            "B": torch.randn(B, T, N),
            "C": torch.randn(B, T, N),
            "D": torch.randn(D),
            "z": torch.randn(B, T, D),
            "delta_bias": 0.1 * torch.randn(D),
            "state": torch.randn(B, D, N),
        }
        options["delta_softplus"] = True
    if packed:
        options["resets"] = torch.rand(B, T) < 0.1
    if ragged:
        options["lengths"] = torch.tensor([T // 2, T, 0, 1])[:B]
    # what bfloat16 can hold, so that all dtypes see the same problem
    return Inputs({name: x.bfloat16().double() for name, x in leaves.items()}, options)


def log_decays(kind: str, *shape: int) -> torch.Tensor:
    g = -torch.rand(shape, dtype=torch.float64)
    match kind:
        case "mild":
            return 0.1 * g
        case "strong":  # sums of -3200 over 64 steps
            return torch.full(shape, -50.0, dtype=torch.float64)
        case "mixed":  # from almost none to gone in one step
            g = g * torch.tensor([0.01, 1.0, 50.0])[torch.randint(3, (shape[1],))].view(1, -1, 1)
            g[:, shape[1] // 2] = -5000.0
            return g
    raise AssertionError(kind)


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 20, x, torch.log(torch.expm1(x.clamp(1e-6, 20))))


def outcome(op, inputs: Inputs, dtype=torch.float64, **options) -> list[torch.Tensor]:
    """Outputs, last state, and the gradients of a fixed functional of both."""
    state_dtype = torch.promote_types(torch.float32, dtype)
    leaves = {
        name: x.to(state_dtype if name == "state" else dtype, copy=True).requires_grad_()
        for name, x in inputs.leaves.items()
    }
    out = op(**leaves, **inputs.options, **options)
    assert out[0].dtype == dtype
    assert out[1].dtype == state_dtype
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, list(leaves.values()), seeds)]


@functools.lru_cache(maxsize=2)  # the forms of a problem are tested one after the other
def problem(op, T, **how) -> tuple[Inputs, list[torch.Tensor]]:
    """Inputs, and the outcome of the step form."""
    inputs = make(op, T, **how)
    return inputs, outcome(op, inputs, backend="reference")


def worst(got, expected) -> float:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))


@FAST
@pytest.mark.crossed("T", "D")
@pytest.mark.parametrize("D", [19, 1, 16, 130])
@pytest.mark.parametrize("T", [100, 1, 2, 31, 32, 33, 63, 64])
@BOTH
def test_forms_agree(op, T, D, backend):
    inputs, exact = problem(op, T, D=D)
    for dtype, tolerance in TOLERANCE.items():
        if op is scan or dtype != torch.bfloat16:  # step sizes are not given in bfloat16
            assert worst(outcome(op, inputs, dtype, backend=backend), exact) <= tolerance
    assert worst(outcome(op, inputs, torch.float32, backend="reference"), exact) <= 2e-5


@FAST
@BOTH
def test_forms_agree_over_a_thousand_steps(op, backend):
    inputs, exact = problem(op, 1000, B=1)
    for dtype in (torch.float64, torch.float32):
        assert worst(outcome(op, inputs, dtype, backend=backend), exact) <= TOLERANCE[dtype]


@FAST
@pytest.mark.parametrize("decay", ["strong", "mixed"])
@BOTH
def test_extreme_decays_stay_exact(op, decay, backend):
    """The gradients of tiny decays are themselves tiny, and must come out right to the same relative error."""
    inputs, exact = problem(op, 130, decay=decay)
    for dtype in (torch.float64, torch.float32):
        assert worst(outcome(op, inputs, dtype, backend=backend), exact) <= TOLERANCE[dtype]


@FAST
@pytest.mark.parametrize("decay", ["mild", "mixed"])
@pytest.mark.parametrize(("packed", "ragged"), [(True, False), (False, True), (True, True)])
@BOTH
def test_forms_agree_on_packed_and_ragged_batches(op, packed, ragged, decay, backend):
    inputs, exact = problem(op, 90, B=4, decay=decay, packed=packed, ragged=ragged)
    for dtype in (torch.float64, torch.float32):
        assert worst(outcome(op, inputs, dtype, backend=backend), exact) <= TOLERANCE[dtype]


@FORMS
@BOTH
def test_a_packed_row_is_its_documents_alone(op, backend):
    inputs = make(op, 100, B=1)
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[:, [0, 37, 64]] = True
    whole, last = op(**inputs.leaves, **inputs.options, resets=resets, backend=backend)
    for start, stop in ((0, 37), (37, 64), (64, 100)):
        part = {name: x[:, start:stop] if along_time(name) else x for name, x in inputs.leaves.items()}
        del part["state"]
        alone, state = op(**part, **inputs.options, backend=backend)
        torch.testing.assert_close(whole[:, start:stop], alone)
    torch.testing.assert_close(last, state)


def along_time(name: str) -> bool:
    return name not in ("state", "A", "D", "delta_bias")


@pytest.mark.parametrize("softplus", [True, False])
@FORMS
@BOTH
def test_a_padded_row_is_the_row_alone(op, backend, softplus):
    inputs = make(op, 70, B=3)
    if not softplus:
        inputs.options.clear()
        inputs.leaves |= {name: inputs.leaves[name].abs() for name in ("delta", "delta_bias") if op is selective_scan}
    lengths = torch.tensor([70, 33, 0])
    padding = torch.arange(70) >= lengths[:, None]
    poisoned = {  # whatever the padding holds
        name: x.masked_fill(padding[..., None], torch.nan) if along_time(name) else x
        for name, x in inputs.leaves.items()
    }
    o, state = op(**poisoned, **inputs.options, lengths=lengths, backend=backend)
    assert o.isfinite().all()
    assert not o[2].any()
    torch.testing.assert_close(state[2], inputs.leaves["state"][2])
    for row in range(2):
        n, one = int(lengths[row]), slice(row, row + 1)
        alone = {
            name: x[one, :n] if along_time(name) else x[one] if name == "state" else x
            for name, x in inputs.leaves.items()
        }
        expected, last = op(**alone, **inputs.options, backend=backend)
        torch.testing.assert_close(o[one, :n], expected)
        torch.testing.assert_close(state[one], last)


@FORMS
@BOTH
def test_a_sequence_can_be_cut_anywhere(op, backend):
    inputs = make(op, 150, decay="mixed")
    state = inputs.leaves.pop("state")
    whole, last = op(**inputs.leaves, **inputs.options, state=state, backend=backend)
    pieces = []
    for start, stop in ((0, 1), (1, 66), (66, 149), (149, 150)):
        part = {name: x[:, start:stop] if along_time(name) else x for name, x in inputs.leaves.items()}
        o, state = op(**part, **inputs.options, state=state, backend=backend)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("backend", "T"),
    [
        ("reference", 6),
        ("chunked", 3),
        ("chunked", 6),
        pytest.param(*COMPILED.values, 3, marks=COMPILED.marks),
        pytest.param(*COMPILED.values, 35, marks=COMPILED.marks),
    ],
)
@BOTH
def test_gradients_by_finite_differences(op, T, backend):
    """Over several chunks of four steps, and over one of the 32 of the kernels."""
    inputs = make(op, T, B=1, D=2, N=2, packed=True)
    names = list(inputs.leaves)
    leaves = [x.requires_grad_() for x in inputs.leaves.values()]
    torch.autograd.gradcheck(
        lambda *x: op(**dict(zip(names, x, strict=True)), **inputs.options, chunk_size=4, backend=backend), leaves
    )


@FORMS
@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "state"])
def test_what_is_optional(left_out, backend):
    inputs = make(selective_scan, 40)
    exact = Inputs({name: x for name, x in inputs.leaves.items() if name != left_out}, inputs.options)
    neutral = {"z": torch.full_like(inputs.leaves["z"], 1.2784645427610738)}  # where silu is 1
    given = inputs.leaves | {left_out: neutral.get(left_out, torch.zeros_like(inputs.leaves[left_out]))}
    expected = selective_scan(**given, **inputs.options, backend="reference")
    got = outcome(selective_scan, exact, backend=backend)[:2]
    torch.testing.assert_close(got, list(expected))


@FORMS
def test_the_definition(backend):
    """Two steps of one channel written out in full."""
    a, b, h = torch.randn(1, 2, 1).double(), torch.randn(1, 2, 1).double(), torch.randn(1, 1).double()
    first = a[0, 0] * h[0] + b[0, 0]
    second = a[0, 1] * first + b[0, 1]
    torch.testing.assert_close(scan(a, b, h, backend=backend)[0], torch.stack([first, second])[None])

    leaves = make(selective_scan, 2, B=1, D=1, N=3).leaves
    A, D, bias, h = leaves["A"][0], leaves["D"][0], leaves["delta_bias"][0], leaves["state"][0, 0]
    for t in range(2):
        u, delta, z = (leaves[name][0, t, 0] for name in ("u", "delta", "z"))
        dt = torch.log1p(torch.exp(delta + bias))
        h = torch.exp(dt * A) * h + dt * leaves["B"][0, t] * u
        y = (h @ leaves["C"][0, t] + D * u) * z * torch.sigmoid(z)
    o, state = selective_scan(**leaves, delta_softplus=True, backend=backend)
    torch.testing.assert_close(o[0, 1, 0], y)
    torch.testing.assert_close(state[0, 0], h)


@FORMS
def test_any_decay_and_any_shape(backend):
    """Negative and growing decays, and more axes than one."""
    a, b = torch.randn(2, 40, 3, 4).double(), torch.randn(2, 40, 3, 4).double()
    h, last = scan(a, b, backend=backend)
    expected, _ = scan(a.flatten(2), b.flatten(2), backend="reference")
    torch.testing.assert_close(h.flatten(2), expected)
    torch.testing.assert_close(last, h[:, -1])


@FORMS
@BOTH
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(op, backend, poisoned_memory):
    inputs = make(op, 70, packed=True, ragged=True)
    before = {name: x.clone() for name, x in inputs.leaves.items()}
    assert all(x.isfinite().all() for x in outcome(op, inputs, torch.float32, backend=backend))
    _, state = op(**inputs.leaves, **inputs.options, backend=backend)
    state.add_(1)
    for name, x in inputs.leaves.items():
        assert torch.equal(x, before[name]), name


@BOTH
def test_autocast_does_not_reach_inside(op):
    inputs = make(op, 40)
    expected = outcome(op, inputs, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(**{name: x.float() for name, x in inputs.leaves.items()}, **inputs.options)
    torch.testing.assert_close(list(got), expected[:2])


@pytest.mark.parametrize("backend", TRACED)
@BOTH
def test_compiles_to_one_graph(op, backend):
    inputs = make(op, 6, packed=True, ragged=True)
    expected = outcome(op, inputs, torch.float32, chunk_size=4, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got = outcome(compiled, inputs, torch.float32, chunk_size=4, backend=backend)
    assert worst(got, [x.double() for x in expected]) <= 2e-5


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")
@pytest.mark.parametrize("op", ["scan", pytest.param("selective_scan", marks=pytest.mark.slow)])  # half a minute
def test_kernels_keep_torchs_rules(op):
    """Schemas, fake tensors and autograd registration, by torch's own checks."""
    inputs = make(globals()[op], 40)
    leaves = [x.requires_grad_() for x in inputs.leaves.values()]
    resets = torch.rand(2, 40) < 0.2
    leaves += [resets, torch.tensor([40, 21])] if op == "scan" else [resets, True, True]
    torch.library.opcheck(getattr(torch.ops.zoo, op).default, leaves)


def test_any_chunk_size_gives_the_same():
    for op in OPS:
        inputs = make(op, 50)
        expected = outcome(op, inputs, backend="reference")
        for chunk_size in (1, 3, 16, 48, 200):
            assert worst(outcome(op, inputs, chunk_size=chunk_size, backend="chunked"), expected) <= 1e-12


def good(op, **changes):
    return make(op, 5).leaves | changes


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        (scan, {"backend": "compile"}, "Unknown backend 'compile'. Did you mean 'compiled'?"),
        (scan, {"a": torch.zeros(2, 5)}, r"a has shape \(2, 5\), expected \(2, 5, 19\) or \(19,\). Shapes: a"),
        (scan, {"b": torch.zeros(2)}, r"b has shape \(2,\). Expected shapes"),
        (scan, {"state": torch.zeros(2, 19)}, "state is torch.float32, expected torch.float64"),
        (scan, {"a": torch.zeros(2, 5, 19, dtype=torch.long)}, "a is torch.int64"),
        (scan, {"chunk_size": 0}, "chunk_size=0 is not allowed"),
        (selective_scan, {"B": torch.zeros(2, 5, 4)}, r"B has shape \(2, 5, 4\), expected \(2, 5, 5\)"),
        (selective_scan, {"A": torch.zeros(19)}, "Expected shapes"),
        (selective_scan, {"delta_bias": torch.zeros(2)}, "delta_bias has shape"),
        (selective_scan, {"z": torch.zeros(2, 5, 19, dtype=torch.long)}, "z is torch.int64"),
        (selective_scan, {"lengths": torch.tensor([1.0, 2.0])}, "lengths is torch.float32"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(op, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        op(**good(op, **changes))
    assert "\n" not in str(caught.value)


def test_a_form_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "off")
    for op in OPS:
        with pytest.raises(UsageError, match="cannot run here: switched off by ZOO_KERNELS"):
            op(**good(op), backend="compiled")
        op(**good(op))


# ---- memory and length


@FAST
def test_no_form_holds_all_states(backend):
    """The largest tensor of a training step is that of the inputs, or the states of one chunk."""
    B, T, D, N = 1, 1024, 64, 64
    inputs = make(selective_scan, T, B=B, D=D, N=N)
    seen = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal seen
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    seen = max(seen, x.numel())
            return out

    leaves = {name: x.requires_grad_() for name, x in inputs.leaves.items()}
    with Largest():
        y, _ = selective_scan(**leaves, **inputs.options, backend=backend)
        y.sum().backward()
    assert seen <= B * T * D * N / 16


@pytest.mark.slow
@pytest.mark.parametrize("slowest", [1e-2, 1e-5])
@FAST
@BOTH
def test_65536_steps(op, backend, slowest):
    """In float32, values and gradients, with the slowest decay gone in 100 or in 100,000 steps."""
    T, D, N = 65_536, 4, 3
    rates = slowest * torch.logspace(0, 2, D)
    inputs = make(op, T, B=1, D=D, N=N)
    if op is scan:
        inputs.leaves["a"] = torch.exp(-rates * (0.5 + torch.rand(1, T, D))).float().double()
    else:
        inputs.leaves["A"] = -torch.arange(1.0, N + 1).expand(D, N).double().clone()
        inputs.leaves["delta"] = inverse_softplus(rates * (0.5 + torch.rand(1, T, D))).float().double()
    exact = outcome(op, inputs, backend="compiled" if native.why_not() is None else "chunked")
    assert worst(outcome(op, inputs, torch.float32, backend=backend), exact) <= 2e-5


@pytest.mark.slow
@FORMS
@BOTH
def test_100_000_steps_one_at_a_time(op, backend):
    """Neither memory nor error grows with the number of steps taken (time: benchmarks/decode.py)."""
    steps, every = 100_000, 10_000
    period = make(op, 64, B=1, D=8)  # the inputs come again and again, so that the state becomes periodic
    state = period.leaves.pop("state").float()
    inputs = [
        {name: (x[:, [t]] if along_time(name) else x).float() for name, x in period.leaves.items()} for t in range(64)
    ]
    memory, states = [], []
    with torch.no_grad():
        for start in range(0, steps, every):
            for t in range(start, start + every):
                _, state = op(**inputs[t % 64], **period.options, state=state, backend=backend)
                if t % 64 == 63 and len(states) < 200 + start // 100:
                    states.append(state)
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        exact = state.double() * 0
        for _ in range(30):  # long enough to forget the start
            exact = op(**period.leaves, **period.options, state=exact, backend="reference")[1]
    assert (states[-1].double() - exact).abs().max() <= 2e-5 * exact.abs().max()
    assert memory[-1] <= memory[1] + 8192  # kilobytes
