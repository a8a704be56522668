"""The CfC cell: its gradients, its extremes, its options."""

import copy
import itertools

import pytest
import torch

import zoo
from zoo.core.errors import UsageError
from zoo.ops import cfc, native
from zoo.protocol import Context

H, U = 3, 4


def inputs(mode, n_layers, timed, B=2, T=5):
    """Float64 leaves of the op, by name."""
    widths = [U] * n_layers + [H * (1 if mode == "pure" else 4 if timed else 3)]
    leaves = {"inputs": torch.randn(B, T, widths[0]), "recurrent": torch.randn(widths[0], H) / H**0.5}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        leaves |= {f"weight {i}": torch.randn(b, a) / a**0.5, f"bias {i}": torch.randn(b)}
    leaves["state"] = torch.randn(B, H)
    if timed:
        leaves["timespans"] = 0.5 + torch.rand(B, T)
    if mode == "pure":
        leaves |= {"tau": torch.randn(H), "level": torch.randn(H)}
    return {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}


def run(leaves, mode, dtype=torch.float64, **options):
    named = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    layers = [(named.pop(f"weight {i}"), named.pop(f"bias {i}")) for i in range(sum("weight" in n for n in leaves))]
    return cfc(layers=layers, mode=mode, **named, **options)


PACKED = {"lengths": torch.tensor([5, 3]), "resets": torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()}


@pytest.mark.parametrize("activation", ["lecun_tanh", "silu", "gelu"])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("n_layers", [0, 2])
@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
def test_gradients(mode, n_layers, timed, activation):
    leaves = inputs(mode, n_layers, timed)

    def function(*values):
        given = dict(zip(leaves, values, strict=True))
        return run(given, mode, activation=activation, backend="reference", **PACKED)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled kernels: {native.why_not()}")
@pytest.mark.parametrize("activation", ["lecun_tanh", "tanh", "relu", "silu", "gelu"])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("n_layers", [0, 1, 2])
@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
def test_compiled_equals_reference(mode, n_layers, timed, activation):
    leaves = inputs(mode, n_layers, timed, B=3, T=40)
    packed = {"lengths": torch.tensor([40, 0, 17]), "resets": torch.rand(3, 40) < 0.1}
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "compiled")):
        for how in ({}, packed):
            out = run(leaves, mode, dtype, activation=activation, backend=backend, **how)
            rng = torch.Generator().manual_seed(1)
            seeds = [torch.randn(x.shape, generator=rng).to(dtype) for x in out]
            results.append([*out, *torch.autograd.grad(out, list(leaves.values()), seeds)])
    for exact, ours in zip(results[:2], results[2:], strict=True):
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
@pytest.mark.parametrize("span", [0.0, 1e-6, 1e3, 1e9])
def test_extreme_time_spans(mode, span, backend):
    mixer = zoo.create_mixer("cfc", 16, mode=mode, backend=backend)
    x = torch.randn(2, 30, 16, requires_grad=True)
    y, state = mixer(x, None, Context(timespans=torch.full((2, 30), span)))
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert state.h.isfinite().all()


def test_padding_may_hold_anything():
    mixer = zoo.create_mixer("cfc", 16)
    x, spans = torch.randn(2, 6, 16), torch.rand(2, 6)
    x[1, 3:], spans[1, 3:] = torch.nan, torch.nan
    y, state = mixer(x, None, Context(lengths=torch.tensor([6, 3]), timespans=spans))
    assert not y[1, 3:].isnan().any()
    torch.testing.assert_close(state.h[1:], mixer(x[1:, :3], None, Context(timespans=spans[1:, :3]))[1].h)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)


def test_without_time_spans_they_are_one():
    mixer = zoo.create_mixer("cfc", 16)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(mixer(x)[0], mixer(x, None, Context(timespans=torch.ones(2, 9)))[0])


def test_time_matters():
    mixer = zoo.create_mixer("cfc", 16)
    x = torch.randn(2, 9, 16)
    early, late = (mixer(x, None, Context(timespans=torch.full((2, 9), span)))[0] for span in (0.1, 3.0))
    assert (early - late).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("word", ["cfc", "cfc(wiring='auto_ncp')", "cfc(mode='pure')", "cfc(mixed_memory=True)"])
def test_a_hundred_thousand_steps(word):
    """In float32 they end where float64 ends, from a state that has not grown."""
    mixer = zoo.create_mixer(word, 16)
    exact = copy.deepcopy(mixer).double()
    n, state, expected_state = 100_000, None, None
    with torch.no_grad():
        for _ in range(0, n, 1000):
            x = torch.randn(1, 1000, 16)
            y, state = mixer(x, state)
            expected, expected_state = exact(x.double(), expected_state)
    assert (y - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert sum(leaf.numel() for leaf in state) * 4 == mixer.state_bytes(1, n, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wiring": "auto_ncp", "backbone_units": 8}, "backbone_units has no effect with wiring='auto_ncp'"),
        ({"n_motor": 3}, "n_motor has no effect with wiring=None; it belongs to"),
        ({"wiring": "ncp"}, "needs ncp_neurons and ncp_synapses"),
        ({"wiring": "auto_ncp", "n_motor": 15}, "it should be less than d_hidden - 2 = 14"),
        ({"wiring": "random", "n_motor": 17}, "n_motor=17 is more than the 16 neurons"),
        ({"mixed_memory": True, "backend": "compiled"}, "mixed_memory has no compiled form"),
        ({"mode": "fast"}, "'default', 'no_gate' or 'pure'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match="cfc") as error:
        zoo.create_mixer("cfc", 16, **options)
    assert message in str(error.value)


def test_wrong_shapes_are_named():
    with pytest.raises(UsageError, match=r"timespans are \(5,\)"):
        zoo.create_mixer("cfc", 16)(torch.randn(2, 5, 16), None, Context(timespans=torch.ones(5)))
    with pytest.raises(UsageError, match="Unknown mode"):
        cfc(torch.randn(1, 2, 9), torch.randn(9, 3), mode="exact")
