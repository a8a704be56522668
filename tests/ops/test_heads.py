"""linear_attention and delta_rule: every form against the float64 step form, in value and in gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from zoo.core.errors import UsageError
from zoo.ops import delta_rule, linear_attention, native

OPS = [linear_attention, delta_rule]
COMPILED = OPS if native.why_not() is None else []
FORMS = [(op, form) for op in OPS for form in ("reference", "chunked", *(["compiled"] if op in COMPILED else []))]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Inputs:
    """Inputs of an op as leaves in the order of its arguments, float64 where their form takes it, and its options."""

    leaves: dict[str, torch.Tensor]
    options: dict[str, object] = field(default_factory=dict)


def make(op, T, *, B=2, G=2, H=4, K=7, V=10, decay=None, packed=False, ragged=False, form=None) -> Inputs:
    leaves = {
        "q": torch.randn(B, T, G, K),
        "k": F.normalize(torch.randn(B, T, G, K), dim=-1),
        "v": torch.randn(B, T, H, V),
    }
    if op is delta_rule:
        leaves["beta"] = 2 * torch.rand(B, T, H)
    if decay is not None:
        leaves["log_decay"] = log_decays(decay, B, T, H, K)
    leaves["state"] = torch.randn(B, H, K, V)
    options: dict[str, object] = {}
    if packed:
        options["resets"] = torch.rand(B, T) < 0.1
    if ragged:
        options["lengths"] = torch.tensor([T // 2, T, 0, 1])[:B]
    # what bfloat16 can hold, so that all dtypes see the same problem
    dtype = torch.float32 if form == "compiled" else torch.float64
    return Inputs({name: x.bfloat16().to(dtype) for name, x in leaves.items()}, options)


def log_decays(kind: str, B: int, T: int, H: int, K: int) -> torch.Tensor:
    where, size = kind.split()
    shape = (B, T, H) if where == "head" else (B, T, H, K)
    g = -torch.rand(shape)
    match size:
        case "mild":
            return 0.1 * g
        case "strong":  # sums of -3200 over a chunk of 64
            return torch.full(shape, -50.0)
        case "mixed":  # from almost none to gone in one step
            g = g * torch.tensor([0.01, 1.0, 50.0])[torch.randint(3, (T,))].view(1, T, *[1] * (g.ndim - 2))
            g[:, T // 2] = -5000.0
            return g
    raise AssertionError(size)


def outcome(op, inputs: Inputs, dtype=torch.float64, **options) -> list[torch.Tensor]:
    """Output, last state, and the gradients of a fixed functional of both."""
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


def fast_forms(op) -> list[tuple[str, torch.dtype]]:
    """What is held against the step form: each fast form in each dtype that it takes."""
    compiled = [("compiled", torch.float32)] if op in COMPILED else []
    return [("chunked", torch.float64), ("chunked", torch.float32), *compiled]


def assert_close(got, expected, dtype):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max()
        assert error <= TOLERANCE[dtype] * b.double().abs().max(), f"{error} beside {b.abs().max()}"


@pytest.mark.crossed("T", "decay")
@pytest.mark.parametrize("decay", ["channel mild", None, "head mild"])
@pytest.mark.parametrize("T", [100, 1, 2, 63, 64, 300])
@pytest.mark.parametrize("op", OPS)
def test_forms_agree(op, T, decay):
    inputs = make(op, T, decay=decay)
    exact = outcome(op, inputs, backend="reference")
    for form, dtype in (*fast_forms(op), ("chunked", torch.bfloat16)):
        assert_close(outcome(op, inputs, dtype, backend=form), exact, dtype)
    assert_close(outcome(op, inputs, torch.float32, backend="reference"), exact, torch.float32)


@pytest.mark.parametrize("decay", [None, "head mild", "channel mild"])
@pytest.mark.parametrize("op", OPS)
def test_forms_agree_over_a_thousand_steps(op, decay):
    inputs = make(op, 1000, B=1, decay=decay)
    exact = outcome(op, inputs, backend="reference")
    for form, dtype in fast_forms(op):
        assert_close(outcome(op, inputs, dtype, backend=form), exact, dtype)


@pytest.mark.parametrize("decay", ["head strong", "head mixed", "channel strong", "channel mixed"])
@pytest.mark.parametrize("op", OPS)
def test_extreme_decays_stay_exact(op, decay):
    """The gradients of tiny decays are themselves tiny, and must come out right to the same relative error."""
    inputs = make(op, 130, decay=decay)
    exact = outcome(op, inputs, backend="reference")
    for form, dtype in fast_forms(op):
        assert_close(outcome(op, inputs, dtype, backend=form), exact, dtype)


@pytest.mark.crossed("packed, ragged", "decay")
@pytest.mark.parametrize("decay", ["channel mixed", None, "head mixed"])
@pytest.mark.parametrize(("packed", "ragged"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("op", OPS)
def test_forms_agree_on_packed_and_ragged_batches(op, packed, ragged, decay):
    inputs = make(op, 90, B=4, decay=decay, packed=packed, ragged=ragged)
    exact = outcome(op, inputs, backend="reference")
    for form, dtype in fast_forms(op):
        assert_close(outcome(op, inputs, dtype, backend=form), exact, dtype)


@pytest.mark.parametrize(("op", "backend"), FORMS)
def test_a_packed_row_is_its_documents_alone(op, backend):
    inputs = make(op, 100, B=1, decay="head mild", form=backend)
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[:, [0, 37, 64]] = True
    whole, last = op(**inputs.leaves, resets=resets, backend=backend)
    over_time = {name: x for name, x in inputs.leaves.items() if name != "state"}
    for start, stop in ((0, 37), (37, 64), (64, 100)):
        alone, state = op(**{name: x[:, start:stop] for name, x in over_time.items()}, backend=backend)
        torch.testing.assert_close(whole[:, start:stop], alone)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize(("op", "backend"), FORMS)
def test_a_padded_row_is_the_row_alone(op, backend):
    inputs = make(op, 70, B=3, decay="channel mild", form=backend)
    lengths = torch.tensor([70, 33, 0])
    poisoned = {  # whatever the padding holds
        name: x
        if name == "state"
        else x.masked_fill((torch.arange(70) >= lengths[:, None]).view(3, 70, *[1] * (x.ndim - 2)), torch.nan)
        for name, x in inputs.leaves.items()
    }
    o, state = op(**poisoned, lengths=lengths, backend=backend)
    assert o.isfinite().all()
    torch.testing.assert_close(state[2], inputs.leaves["state"][2])
    for row in range(2):
        n = lengths[row]
        alone = {k: x[row : row + 1] if k == "state" else x[row : row + 1, :n] for k, x in inputs.leaves.items()}
        expected, last = op(**alone, backend=backend)
        torch.testing.assert_close(o[row : row + 1, :n], expected)
        torch.testing.assert_close(state[row : row + 1], last)


@pytest.mark.parametrize("decay", [None, "head mixed", "channel mild"])
@pytest.mark.parametrize("op", OPS)
def test_a_sequence_can_be_cut_anywhere(op, decay):
    inputs = make(op, 150, decay=decay)
    state = inputs.leaves.pop("state")
    whole, last = op(**inputs.leaves, state=state, chunk_size=32)
    pieces = []
    for start, stop in ((0, 1), (1, 66), (66, 149), (149, 150)):
        o, state = op(**{name: x[:, start:stop] for name, x in inputs.leaves.items()}, state=state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [None, "head mild", "channel mild"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_by_finite_differences(op, decay):
    inputs = make(op, 5, B=1, G=1, H=2, K=2, V=3, decay=decay)
    names = list(inputs.leaves)
    leaves = [x.requires_grad_() for x in inputs.leaves.values()]
    for backend in ("reference", "chunked"):
        torch.autograd.gradcheck(
            lambda *x, b=backend: op(**dict(zip(names, x, strict=True)), chunk_size=3, backend=b), leaves
        )


def test_beta_of_two_reflects_without_growing():
    """The hardest case for the inverse inside a chunk: one key, beta 2, so that its entries alternate in sign."""
    T = 256
    k = F.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, T, 1, 8)
    leaves = {"q": k, "k": k, "v": torch.randn(1, T, 1, 8), "beta": torch.full((1, T, 1), 2.0)}
    inputs = Inputs({name: x.double() for name, x in leaves.items()} | {"state": torch.randn(1, 1, 8, 8).double()})
    assert_close(
        outcome(delta_rule, inputs, torch.float32), outcome(delta_rule, inputs, backend="reference"), torch.float32
    )


@pytest.mark.parametrize("op", OPS)
def test_the_definition(op):
    """Two steps written out in full."""
    inputs = make(op, 2, B=1, G=1, H=1, decay="channel mild").leaves
    S = inputs["state"][0, 0]
    for t in range(2):
        q, k, v, g = (inputs[name][0, t, 0] for name in ("q", "k", "v", "log_decay"))
        S = torch.diag(g.exp()) @ S
        if op is delta_rule:
            beta = inputs["beta"][0, t, 0]
            S = (torch.eye(len(k)) - beta * torch.outer(k, k)).double() @ S + beta * torch.outer(k, v)
        else:
            S = S + torch.outer(k, v)
        expected = len(k) ** -0.5 * S.T @ q
    for backend in ("reference", "chunked"):
        o, state = op(**inputs, backend=backend)
        torch.testing.assert_close(o[0, 1, 0], expected)
        torch.testing.assert_close(state[0, 0], S)
        torch.testing.assert_close(op(**inputs, scale=1.0, backend=backend)[0], o * len(k) ** 0.5)


@pytest.mark.parametrize(("op", "backend"), FORMS)
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(op, backend, poisoned_memory):
    inputs = make(op, 70, decay="head mild", packed=True, ragged=True, form=backend)
    before = {name: x.clone() for name, x in inputs.leaves.items()}
    assert all(x.isfinite().all() for x in outcome(op, inputs, torch.float32, backend=backend))
    _, state = op(**inputs.leaves, **inputs.options, backend=backend)
    state.add_(1)
    for name, x in inputs.leaves.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_reach_inside(op):
    inputs = make(op, 40, decay="head mild")
    expected = outcome(op, inputs, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = op(**{name: x.float() for name, x in inputs.leaves.items()})
    torch.testing.assert_close(o, expected[0])
    torch.testing.assert_close(state, expected[1])


@pytest.mark.parametrize("decay", ["head mild", "channel mild"])
@pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, form, marks=[pytest.mark.slow] if form == "chunked" else [])
        for op, form in FORMS
        if form != "reference"
    ],
)
def test_compiles_to_one_graph(op, backend, decay):
    inputs = make(op, 20, decay=decay, packed=True, ragged=True)
    options = {"chunk_size": 8, "backend": backend}
    expected = outcome(op, inputs, torch.float32, **options)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_close(outcome(compiled, inputs, torch.float32, **options), expected, torch.float32)


@pytest.mark.parametrize("channels", [(), (8,)])
@pytest.mark.parametrize("form", [form for op, form in FORMS if op is linear_attention and form != "reference"])
def test_a_constant_slow_decay_over_65536_steps(form, channels):
    """The roundings of exp(-2 ** -12), all alike, would add up to more than the tolerance."""
    T = 65_536
    inputs = make(linear_attention, T, B=1, G=1, H=1, K=8, V=8)
    inputs.leaves["log_decay"] = torch.full((1, T, 1, *channels), -(2.0**-12), dtype=torch.float64)
    exact = outcome(linear_attention, inputs, backend="chunked")
    assert_close(outcome(linear_attention, inputs, torch.float32, backend=form), exact, torch.float32)


@pytest.mark.skipif(not COMPILED, reason="no kernels here")
@pytest.mark.parametrize("decay", [None, "head mild", "channel mixed"])
@pytest.mark.parametrize(("G", "H", "K", "V"), [(1, 1, 5, 7), (1, 5, 64, 64), (2, 4, 130, 24), (3, 3, 33, 17)])
def test_compiled_heads_of_any_size(G, H, K, V, decay):
    inputs = make(linear_attention, 170, G=G, H=H, K=K, V=V, decay=decay, packed=True)
    exact = outcome(linear_attention, inputs, backend="chunked")
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 16):  # a group's heads are cut into tasks
            torch.set_num_threads(n)
            assert_close(outcome(linear_attention, inputs, torch.float32, backend="compiled"), exact, torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not COMPILED, reason="no kernels here")
@pytest.mark.parametrize("wanted", ["q", "k", "v", "log_decay", "state"])
def test_compiled_gradient_of_one_input_alone(wanted):
    """From inputs that are slices of wider tensors, and from one of the two outputs alone."""
    inputs = make(linear_attention, 40, decay="head mild")
    exact = dict(zip(inputs.leaves, outcome(linear_attention, inputs, backend="reference")[2:], strict=True))
    leaves = {name: torch.cat([x, x], -1)[..., : x.shape[-1]].float() for name, x in inputs.leaves.items()}
    leaves[wanted].requires_grad_()
    o, state = linear_attention(**leaves, backend="compiled")
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).float() for x in (o, state)]
    if wanted == "q":
        got = torch.autograd.grad(o, leaves[wanted], seeds[0])
    else:
        parts = [
            torch.autograd.grad(x, leaves[wanted], s, retain_graph=True)[0]
            for x, s in ((o, seeds[0]), (state, seeds[1]))
        ]
        got = [sum(parts)]
    assert_close(got, [exact[wanted]], torch.float32)


def test_a_group_is_never_expanded():
    """Sixteen heads on one group of wide keys: no tensor of the size of expanded keys appears."""
    T, H, K = 64, 16, 512
    seen = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal seen
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    seen = max(seen, x.untyped_storage().nbytes())
            return out

    q, k, v = torch.randn(1, T, 1, K), torch.randn(1, T, 1, K), torch.randn(1, T, H, 2)
    with Largest():
        linear_attention(q, k, v, -torch.rand(1, T, H), backend="chunked")
    assert seen < 4 * T * H * K / 4


def good(**changes):
    inputs = make(delta_rule, 5, decay="head mild").leaves
    return inputs | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "chunk"}, "Unknown backend 'chunk'. Did you mean 'chunked'?"),
        ({"backend": "fused"}, "Available: auto, reference, chunked"),
        ({"v": torch.zeros(2, 5, 3, 10)}, "do not go together"),
        ({"k": torch.zeros(2, 5, 2, 8)}, r"k has shape \(2, 5, 2, 8\), expected \(2, 5, 2, 7\)"),
        ({"beta": torch.zeros(2, 5)}, "beta has shape"),
        ({"log_decay": torch.zeros(2, 5, 4, 10)}, r"expected \(2, 5, 4\) or \(2, 5, 4, 7\). Shapes: q, k"),
        ({"state": torch.zeros(2, 4, 10, 7)}, "state has shape"),
        ({"state": torch.zeros(2, 4, 7, 10)}, "state is torch.float32, expected torch.float64"),
        ({"beta": torch.zeros(2, 5, 4, dtype=torch.long)}, "beta is torch.int64, expected a floating-point tensor"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths is torch.float32"),
        ({"resets": torch.zeros(2, 5)}, "resets is torch.float32, expected bool"),
        ({"resets": torch.zeros(5, dtype=torch.bool)}, "resets has shape"),
        ({"chunk_size": 0}, "chunk_size=0 is not allowed"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        delta_rule(**good(**changes))
    assert "\n" not in str(caught.value)


def test_any_chunk_size_gives_the_same():
    inputs = make(delta_rule, 50, decay="channel mild")
    expected = outcome(delta_rule, inputs, backend="reference")
    for chunk_size in (1, 3, 16, 48, 200):
        assert_close(outcome(delta_rule, inputs, chunk_size=chunk_size), expected, torch.float64)
