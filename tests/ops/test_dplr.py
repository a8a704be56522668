"""dplr: every form against the float64 step form, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import delta_rule, dplr

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}
OVER_TIME = ("q", "k", "v", "a", "b", "log_decay")
DECAYS = [None, "head mild", "channel mild", "head strong", "channel strong", "head mixed", "channel mixed"]


def make(T, *, B=2, G=2, H=4, K=7, V=10, decay: str | None = "channel mild") -> dict[str, Tensor]:
    """Float64 inputs that bfloat16 can hold, so that all dtypes see the same problem."""
    direction = F.normalize(torch.randn(B, T, H, K), dim=-1)
    leaves = {
        "q": torch.randn(B, T, G, K),
        "k": 0.5 * torch.randn(B, T, G, K),
        "v": torch.randn(B, T, H, V),
        "a": -direction,
        "b": direction * torch.rand(B, T, H, K),
        "state": torch.randn(B, H, K, V),
    }
    if decay is not None:
        leaves["log_decay"] = log_decays(decay, B, T, H, K)
    return {name: x.bfloat16().double() for name, x in leaves.items()}


def log_decays(kind: str, B: int, T: int, H: int, K: int) -> Tensor:
    where, size = kind.split()
    shape = (B, T, H) if where == "head" else (B, T, H, K)
    match size:
        case "mild":
            return -0.6 * torch.rand(shape)
        case "strong":  # sums of -1600 over a chunk of 32, of -6400 over one of 128
            return torch.full(shape, -50.0)
        case "mixed":  # from almost none to gone in one step
            g = -torch.rand(shape) * torch.tensor([0.01, 1.0, 50.0])[torch.randint(3, (T,))].view(
                1, T, *[1] * (len(shape) - 2)
            )
            g[:, T // 2] = -5000.0
            return g
    raise AssertionError(size)


def outcome(inputs: dict[str, Tensor], dtype=torch.float64, op=dplr, **options) -> list[Tensor]:
    """Output, last state, and the gradients of a fixed functional of both."""
    state_dtype = torch.promote_types(torch.float32, dtype)
    leaves = {
        name: x.to(state_dtype if name == "state" else dtype, copy=True).requires_grad_() for name, x in inputs.items()
    }
    out = op(**leaves, **options)
    assert out[0].dtype == dtype
    assert out[1].dtype == state_dtype
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, list(leaves.values()), seeds)]


def assert_close(got, expected, dtype):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max()
        assert error <= TOLERANCE[dtype] * b.double().abs().max(), f"{i}: {error} beside {b.abs().max()}"


@pytest.mark.crossed("T", "decay")
@pytest.mark.parametrize("decay", ["channel mild", None, "head mild"])
@pytest.mark.parametrize("T", [100, 1, 2, 5, 31, 32, 33, 63, 64, 300])
def test_forms_agree(T, decay):
    inputs = make(T, decay=decay)
    exact = outcome(inputs, backend="reference")
    for dtype in TOLERANCE:
        assert_close(outcome(inputs, dtype, backend="chunked"), exact, dtype)
    assert_close(outcome(inputs, torch.float32, backend="reference"), exact, torch.float32)


@pytest.mark.parametrize("chunk_size", [None, 64, 128])
@pytest.mark.parametrize("decay", DECAYS[3:])
def test_extreme_decays_stay_exact(decay, chunk_size):
    """The gradients of tiny decays are themselves tiny, and must come out right to the same relative error."""
    inputs = make(130, decay=decay)
    exact = outcome(inputs, backend="reference")
    for dtype in (torch.float64, torch.float32):
        assert_close(outcome(inputs, dtype, backend="chunked", chunk_size=chunk_size), exact, dtype)


def test_a_sum_of_five_thousand_is_exact_to_the_last_step():
    """Decays that underflow to zero beside ones that do not, in the same chunk."""
    inputs = make(64, decay=None) | {"log_decay": torch.full((2, 64, 4, 7), -5000.0 / 32).double()}
    inputs["log_decay"][:, :, :, ::2] = -1e-3
    exact = outcome(inputs, backend="reference")
    for dtype in (torch.float64, torch.float32):
        assert_close(outcome(inputs, dtype, backend="chunked"), exact, dtype)


@pytest.mark.crossed("packed, ragged", "decay")
@pytest.mark.parametrize("decay", DECAYS[::-1])
@pytest.mark.parametrize(("packed", "ragged"), [(True, True), (True, False), (False, True)])
def test_forms_agree_on_packed_and_ragged_batches(packed, ragged, decay):
    inputs = make(90, B=4, decay=decay)
    options: dict[str, Tensor] = {}
    if packed:
        options["resets"] = torch.rand(4, 90) < 0.1
    if ragged:
        options["lengths"] = torch.tensor([45, 90, 0, 1])
    exact = outcome(inputs, backend="reference", **options)
    for dtype in (torch.float64, torch.float32):
        assert_close(outcome(inputs, dtype, backend="chunked", **options), exact, dtype)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_packed_row_is_its_documents_alone(backend):
    inputs = make(100, B=1)
    resets = torch.zeros(1, 100, dtype=torch.bool)
    resets[:, [0, 37, 64]] = True
    whole, last = dplr(**inputs, resets=resets, backend=backend)
    for start, stop in ((0, 37), (37, 64), (64, 100)):
        alone, state = dplr(**{name: inputs[name][:, start:stop] for name in OVER_TIME}, backend=backend)
        torch.testing.assert_close(whole[:, start:stop], alone)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_padded_row_is_the_row_alone(backend):
    inputs = make(70, B=3)
    lengths = torch.tensor([70, 33, 0])
    padding = torch.arange(70) >= lengths[:, None]
    poisoned = {  # whatever the padding holds
        name: x if name == "state" else x.masked_fill(padding.view(3, 70, *[1] * (x.ndim - 2)), torch.nan)
        for name, x in inputs.items()
    }
    o, state = dplr(**poisoned, lengths=lengths, backend=backend)
    assert o.isfinite().all()
    torch.testing.assert_close(state[2], inputs["state"][2])
    for row in range(2):
        n = lengths[row]
        alone = {k: x[row : row + 1] if k == "state" else x[row : row + 1, :n] for k, x in inputs.items()}
        expected, last = dplr(**alone, backend=backend)
        torch.testing.assert_close(o[row : row + 1, :n], expected)
        torch.testing.assert_close(state[row : row + 1], last)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_can_be_cut_anywhere(decay):
    inputs = make(150, decay=decay)
    state = inputs.pop("state")
    whole, last = dplr(**inputs, state=state)
    pieces = []
    for start, stop in ((0, 1), (1, 66), (66, 149), (149, 150)):
        o, state = dplr(**{name: x[:, start:stop] for name, x in inputs.items()}, state=state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [None, "head mild", "channel mild"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_by_finite_differences(backend, decay):
    inputs = make(5, B=1, G=1, H=2, K=2, V=3, decay=decay)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.autograd.gradcheck(
        lambda *x: dplr(**dict(zip(inputs, x, strict=True)), chunk_size=3, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_by_finite_differences_packed_and_ragged(backend):
    inputs = make(6, B=2, G=1, H=1, K=2, V=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    fields = {"resets": torch.arange(6).eq(2).expand(2, 6), "lengths": torch.tensor([6, 4])}
    torch.autograd.gradcheck(
        lambda *x: dplr(**dict(zip(inputs, x, strict=True)), chunk_size=4, backend=backend, **fields), leaves
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_definition(backend):
    """Two steps written out in full."""
    inputs = make(2, B=1, G=1, H=1)
    S = inputs["state"][0, 0]
    for t in range(2):
        q, k, v, a, b, g = (inputs[name][0, t, 0] for name in OVER_TIME)
        S = torch.diag(g.exp()) @ S + torch.outer(b, a) @ S + torch.outer(k, v)
        expected = len(k) ** -0.5 * S.T @ q
    o, state = dplr(**inputs, backend=backend)
    torch.testing.assert_close(o[0, 1, 0], expected)
    torch.testing.assert_close(state[0, 0], S)
    torch.testing.assert_close(dplr(**inputs, scale=1.0, backend=backend)[0], o * len(k) ** 0.5)


def test_the_delta_rule_is_a_special_case():
    """a = -exp(g) k, b = beta k, k = beta k: Kimi Delta Attention."""
    inputs = make(100, G=4)
    q, v, g, state = (inputs[name] for name in ("q", "v", "log_decay", "state"))
    k, beta = F.normalize(inputs["k"], dim=-1), torch.rand(2, 100, 4).double()
    write = beta[..., None] * k
    for got, expected in zip(
        dplr(q, write, v, -g.exp() * k, write, g, state), delta_rule(q, k, v, beta, g, state), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_groups_are_repeated_heads():
    inputs = make(50, G=2)
    o, state = dplr(**inputs)
    repeated = inputs | {name: inputs[name].repeat_interleave(2, 2) for name in ("q", "k")}
    for got, expected in zip(dplr(**repeated), (o, state), strict=True):
        torch.testing.assert_close(got, expected)


def test_any_chunk_size_gives_the_same():
    inputs = make(50)
    expected = outcome(inputs, backend="reference")
    for chunk_size in (1, 3, 16, 48, 200):
        assert_close(outcome(inputs, chunk_size=chunk_size), expected, torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (65, 1, 33)], ids=str)
def test_odd_sizes(shape):
    K, V, T = shape[0], shape[1], 37 * shape[2]
    inputs = make(T, B=1, G=1, H=1, K=K, V=V)
    exact = outcome(inputs, backend="reference")
    assert_close(outcome(inputs, torch.float32, backend="chunked"), exact, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_inputs_are_left_alone_and_no_memory_is_read_unwritten(backend, poisoned_memory):
    inputs = make(70)
    fields = {"resets": torch.rand(2, 70) < 0.1, "lengths": torch.tensor([35, 70])}
    before = {name: x.clone() for name, x in inputs.items()}
    assert all(x.isfinite().all() for x in outcome(inputs, torch.float32, backend=backend, **fields))
    _, state = dplr(**inputs, **fields, backend=backend)
    state.add_(1)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


def test_sixty_five_thousand_steps():
    """float32 against float64: errors do not add up, with decays as slow as RWKV-7 has them and slower."""
    T = 65536
    inputs = make(T, B=1, G=1, H=1, K=16, V=16)
    inputs["log_decay"] = -torch.logspace(-6, -0.3, 16).expand(1, T, 1, 16).double()
    with torch.no_grad():
        exact = dplr(**inputs)
        o, state = dplr(**{name: x.float() for name, x in inputs.items()})
    assert_close([o, state], exact, torch.float32)
    assert_close([o[:, -1000:]], [exact[0][:, -1000:]], torch.float32)


def test_autocast_does_not_reach_inside():
    inputs = {name: x.float() for name, x in make(40).items()}
    expected = dplr(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dplr(**inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_compiles_to_one_graph():
    inputs, fields = make(20), {"resets": torch.rand(2, 20) < 0.1, "lengths": torch.tensor([20, 10])}
    expected = outcome(inputs, torch.float32, chunk_size=8, **fields)
    torch._dynamo.reset()
    compiled = torch.compile(dplr, fullgraph=True, backend="aot_eager")
    assert_close(outcome(inputs, torch.float32, compiled, chunk_size=8, **fields), expected, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "chunk"}, "Unknown backend 'chunk'. Did you mean 'chunked'?"),
        ({"v": torch.zeros(2, 5, 3, 10)}, "do not go together"),
        ({"a": torch.zeros(2, 5, 2, 7)}, r"dplr: a has shape \(2, 5, 2, 7\), expected \(2, 5, 4, 7\). Shapes: .* a, b"),
        ({"b": torch.zeros(2, 5, 4, 10)}, "b has shape"),
        ({"b": torch.zeros(2, 5, 4, 7, dtype=torch.long)}, "b is torch.int64, expected a floating-point tensor"),
        ({"log_decay": torch.zeros(2, 5, 4, 10)}, r"expected \(2, 5, 4\) or \(2, 5, 4, 7\)"),
        ({"state": torch.zeros(2, 4, 7, 10)}, "state is torch.float32, expected torch.float64"),
        ({"resets": torch.zeros(2, 5)}, "resets is torch.float32, expected bool"),
        ({"chunk_size": 0}, "chunk_size=0 is not allowed"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        dplr(**(make(5) | changes))
    assert "\n" not in str(caught.value)
