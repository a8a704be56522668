"""The LTC cell: its gradients, its extremes, its signs."""

import copy

import pytest
import torch

import zoo
from zoo.core.errors import UsageError
from zoo.ops import Synapses, ltc, native
from zoo.protocol import Context

P, N = 3, 4
PACKED = {"lengths": torch.tensor([4, 2]), "resets": torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]]).bool()}


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape)


def inputs(timed, B=2, T=4, P=P, N=N):
    """Float64 leaves of the op, by name."""
    leaves = {"x": torch.randn(B, T, P)}
    for name, n in (("sensory", P), ("inner", N)):
        leaves[f"{name} mu"], leaves[f"{name} sigma"] = uniform(0.3, 0.8, n, N), uniform(3, 8, n, N)
        leaves[f"{name} weight"] = uniform(0.001, 1, n, N) * (torch.rand(n, N) < 0.7)
        leaves[f"{name} reversal"] = torch.randint(0, 2, (n, N)) * 2.0 - 1
    leaves |= {"leak": uniform(0.001, 1, N), "rest": uniform(-0.2, 0.2, N), "capacity": uniform(0.4, 0.6, N)}
    leaves["state"] = torch.randn(B, N)
    if timed:
        leaves["timespans"] = uniform(0.1, 2, B, T)
    return {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}


def run(leaves, dtype=torch.float64, **options):
    named = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    sensory, inner = (Synapses(*(named.pop(f"{n} {part}") for part in Synapses._fields)) for n in ("sensory", "inner"))
    return ltc(sensory=sensory, inner=inner, **named, **options)


@pytest.mark.parametrize("timed", [False, True])
def test_gradients(timed):
    leaves = inputs(timed)

    def function(*values):
        return run(dict(zip(leaves, values, strict=True)), unfolds=3, backend="reference", **PACKED)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled kernels: {native.why_not()}")
@pytest.mark.parametrize("shape", [{"P": 1, "N": 1}, {"P": 20, "N": 16}, {"P": 7, "N": 33}])
@pytest.mark.parametrize("timed", [False, True])
def test_compiled_equals_reference(timed, shape):
    leaves = inputs(timed, B=3, T=40, **shape)
    packed = {"lengths": torch.tensor([40, 0, 17]), "resets": torch.rand(3, 40) < 0.1}
    for how in ({}, packed):
        results = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "compiled")):
            out = run(leaves, dtype, backend=backend, **how)
            rng = torch.Generator().manual_seed(1)
            seeds = [torch.randn(x.shape, generator=rng).to(dtype) for x in out]
            results.append([*out, *torch.autograd.grad(out, list(leaves.values()), seeds)])
        for exact, ours in zip(*results, strict=True):
            assert (ours - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("positivity", ["softplus", "clip"])
@pytest.mark.parametrize("span", [0.0, 1e-6, 1e3, 1e9])
def test_extreme_time_spans(span, positivity, backend):
    mixer = zoo.create_mixer("ltc", 16, positivity=positivity, backend=backend)
    if positivity == "clip":
        with torch.no_grad():
            mixer.cm[:2] = -1.0  # a capacity that training has driven below zero
    x = torch.randn(2, 10, 16, requires_grad=True)
    _, past = mixer(x)
    y, state = mixer(x, past, Context(timespans=torch.full((2, 10), span)))
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert state.v.abs().max() <= 1.001  # between the reversal potentials
    if span == 0:
        torch.testing.assert_close(state.v, past.v)


def test_a_long_time_ends_at_rest():
    """After a time without end a neuron is where its currents cancel, whatever it was before."""
    mixer = zoo.create_mixer("ltc", 16, unfolds=200).double()
    x, spans = torch.randn(2, 1, 16).double(), torch.full((2, 1), 1e3).double()
    past = mixer.init_state(2)
    ends = [mixer(x, type(past)(v), Context(timespans=spans))[1].v for v in (past.v - 0.5, past.v + 0.5)]
    torch.testing.assert_close(ends[0], ends[1])


def test_clipped_parameters_come_back():
    mixer = zoo.create_mixer("ltc(positivity='clip')", 16)
    with torch.no_grad():
        mixer.w.fill_(-0.5)
    y, _ = mixer(torch.randn(2, 5, 16))
    y.sum().backward()
    assert mixer.w.grad.any()
    zero = copy.deepcopy(mixer)
    with torch.no_grad():
        zero.w.zero_()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(mixer(x)[0], zero(x)[0], rtol=0, atol=0)


def test_initial_ranges_are_the_published_ones():
    mixer = zoo.create_mixer("ltc", 64)
    ranges = {"gleak": (0.001, 1), "vleak": (-0.2, 0.2), "cm": (0.4, 0.6), "w": (0.001, 1), "mu": (0.3, 0.8)}
    for name, (low, high) in {**ranges, "sigma": (3, 8), "sensory_sigma": (3, 8), "sensory_mu": (0.3, 0.8)}.items():
        p = getattr(mixer, name)
        assert low <= p.min() < p.max() <= high
    assert set(mixer.erev.unique().tolist()) == {-1.0, 1.0}


def test_a_synapse_left_out_carries_nothing():
    mixer = zoo.create_mixer("ltc(wiring='auto_ncp')", 16)
    x = torch.randn(2, 5, 16)
    y, _ = mixer(x)
    with torch.no_grad():
        for prefix in ("", "sensory_"):
            absent = getattr(mixer, prefix + "sparsity_mask") == 0
            assert absent.any()
            getattr(mixer, prefix + "w")[absent] = 7.0
            getattr(mixer, prefix + "erev")[absent] = 7.0
    torch.testing.assert_close(mixer(x)[0], y, rtol=0, atol=0)


@pytest.mark.slow
def test_a_hundred_thousand_steps():
    """In float32 they end where float64 ends, from a state that has not grown."""
    mixer = zoo.create_mixer("ltc", 16)
    exact = copy.deepcopy(mixer).double()
    state, expected_state = None, None
    with torch.no_grad():
        for _ in range(100):
            x = torch.randn(1, 1000, 16)
            y, state = mixer(x, state)
            expected, expected_state = exact(x.double(), expected_state)
    assert (y - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert state.v.numel() * 4 == mixer.state_bytes(1, 100_000, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wiring": "small_world"}, "'fully_connected', 'random', 'auto_ncp' or 'ncp'"),
        (
            {"sparsity": 0.2},
            "sparsity has no effect with wiring='fully_connected'; it belongs to 'random' or 'auto_ncp'",
        ),
        ({"wiring": "auto_ncp", "sparsity": 0.05}, "it should be from 0.1 to 0.9"),
        ({"wiring": "ncp", "ncp_neurons": (3, 2, 1), "ncp_synapses": (4, 1, 1, 1)}, "more partners than"),
        ({"wiring": "ncp", "ncp_neurons": (3, 2, 1), "ncp_synapses": (1, 1, 1, 1), "d_hidden": 9}, "not the sum"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError) as error:
        zoo.create_mixer("ltc", 16, **options)
    assert message in str(error.value)
