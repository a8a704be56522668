"""The ODE-RNN against torchdiffeq, torch's GRU cell and its own solvers."""

import copy

import pytest
import torch
from torchdiffeq import odeint

import zoo
from zoo.core.errors import UsageError
from zoo.protocol import Context

B, T, D = 3, 12, 16


def by_hand(mixer, x, spans, n_steps=None, **solver):
    """Algorithm 1 with torchdiffeq, one row at a time over its own time, in `n_steps` steps where given."""

    def f(_, h):
        for layer in mixer.f[:-1]:
            h = layer(h).tanh()
        return mixer.f[-1](h)

    h, outputs = mixer.init_state(len(x)).h, []
    for t in range(x.shape[1]):
        ends = []
        for row, span in enumerate(spans[:, t]):
            grid = torch.linspace(0, 1, (n_steps or 1) + 1).double() * span
            if n_steps:
                solver["options"] = {"grid_constructor": lambda f, y, t, grid=grid: grid}
            ends.append(odeint(f, h[row], grid[[0, -1]], **solver)[1])
        h = mixer.cell(x[:, t], torch.stack(ends))
        outputs.append(h if mixer.fc is None else mixer.fc(h))
    return torch.stack(outputs, 1)


def case(**options):
    mixer = zoo.create_mixer("neural_ode", D, **options).double()
    with torch.no_grad():
        for p in mixer.f.parameters():
            p += 0.2 * torch.randn_like(p)
    return mixer, torch.randn(B, T, D).double(), 0.5 + torch.rand(B, T).double()


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "euler"])
def test_fixed_steps_are_those_of_torchdiffeq(solver):
    mixer, x, spans = case(solver=solver, substeps=4, d_hidden=10, f_layers=2, f_units=12)
    y, _ = mixer(x, None, Context(timespans=spans))
    expected = by_hand(mixer, x, spans, n_steps=4, method=solver)
    assert (y - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.slow
def test_default_is_near_the_exact_solution():
    mixer, x, spans = case()
    assert mixer.config.solver == "rk4"
    assert mixer.config.substeps >= 4
    y, _ = mixer(x, None, Context(timespans=spans))
    exact = by_hand(mixer, x, spans, rtol=1e-11, atol=1e-12)
    assert (y - exact).abs().max() <= 1e-4 * exact.abs().max()
    finer = copy.deepcopy(mixer)
    finer.config = mixer.config.model_copy(update={"substeps": 32})
    error = (finer(x, None, Context(timespans=spans))[0] - exact).abs().max()
    assert error <= 1e-7 * exact.abs().max()  # of order 4: eight times finer, 4096 times closer


def test_adaptive_solver():
    """Rows share their steps, and are each right to the tolerance asked for."""
    mixer, x, spans = case(solver="dopri5", rtol=1e-8, atol=1e-9)
    y, _ = mixer(x, None, Context(timespans=spans))
    exact = by_hand(mixer, x, spans, rtol=1e-11, atol=1e-12)
    assert (y - exact).abs().max() <= 1e-6 * exact.abs().max()
    alone, _ = mixer(x[:1], None, Context(timespans=spans[:1]))
    assert (y[:1] - alone).abs().max() <= 1e-6 * exact.abs().max()
    assert mixer.traits.couples_rows
    assert mixer.traits.not_compilable


@pytest.mark.parametrize("options", [{"solver": "dopri5", "rtol": 1e-9, "atol": 1e-10}, {"substeps": 32}])
def test_adjoint_gradients(options):
    """The adjoint's gradients, those of the time spans among them, are those through the solver."""
    plain, x, spans = case(**options)
    adjoint = zoo.create_mixer("neural_ode", D, adjoint=True, **options).double()
    adjoint.load_state_dict(plain.state_dict())
    gradients = []
    for mixer in (plain, adjoint):
        leaves = [x.clone().requires_grad_(), spans.clone().requires_grad_(), *mixer.parameters()]
        y, _ = mixer(leaves[0], None, Context(timespans=leaves[1]))
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "euler"])
def test_gradients(solver):
    mixer = zoo.create_mixer("neural_ode", 16, d_hidden=3, solver=solver, substeps=2).double()
    x, spans = torch.randn(2, 3, 16).double(), torch.rand(2, 3).double()
    packed = {"lengths": torch.tensor([3, 2]), "resets": torch.tensor([[0, 1, 0], [0, 0, 0]]).bool()}

    def function(x, spans, *parameters):
        named = dict(zip((n for n, _ in mixer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(mixer, named, (x, None, Context(timespans=spans, **packed)))[0]

    leaves = (x.requires_grad_(), spans.requires_grad_(), *mixer.parameters())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("span", [0.0, 1e-6, 1e3])
def test_extreme_time_spans(span, solver):
    mixer = zoo.create_mixer("neural_ode", D, solver=solver)
    x = torch.randn(2, 5, D, requires_grad=True)
    y, _ = mixer(x, None, Context(timespans=torch.full((2, 5), span)))
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    if span == 0:  # nothing passes between observations: a plain GRU
        gru = torch.nn.GRU(D, D, batch_first=True)
        gru.load_state_dict({f"{name}_l0": p for name, p in mixer.cell.named_parameters()})
        torch.testing.assert_close(y, gru(x)[0])


@pytest.mark.slow
def test_a_hundred_thousand_steps():
    """In float32 they end where float64 ends, from a state that has not grown."""
    mixer = zoo.create_mixer("neural_ode", D)
    exact = copy.deepcopy(mixer).double()
    state, expected_state = None, None
    with torch.no_grad():
        for _ in range(100):
            x = torch.randn(1, 1000, D)
            y, state = mixer(x, state)
            expected, expected_state = exact(x.double(), expected_state)
    assert (y - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert state.h.numel() * 4 == mixer.state_bytes(1, 100_000, torch.float32)


@pytest.mark.parametrize("options", [{"rtol": 1e-3}, {"solver": "dopri5", "substeps": 8}])
def test_options_without_effect_are_named(options):
    with pytest.raises(UsageError, match="has no effect with solver="):
        zoo.create_mixer("neural_ode", D, **options)
