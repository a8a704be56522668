"""CfC, LTC and their wirings against the authors' package ncps, weights copied by name.

ncps is run cell by cell: its sequence classes mix up rows when `timespans` are given for several of them.
"""

from __future__ import annotations

from collections.abc import Callable

import ncps.torch
import pytest
import torch
from ncps import wirings
from torch import Tensor, nn

import zoo
from zoo.mixers._wirings import Wiring, WiringOptions, make_wiring
from zoo.protocol import Context, Mixer

B, T, D = 3, 40, 16
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
Names = Callable[[str], str]


def cfc_names(name: str) -> str:
    """ncps's name of a parameter of CfC to ours: a rename, the backbone's activations not counted."""
    name = name.removeprefix("rnn_cell.")
    if name.startswith(("lstm.", "fc.")):
        return name
    cell, _, rest = name.rpartition("layer_")[2].partition(".") if name.startswith("layer_") else ("0", "", name)
    if rest.startswith("backbone."):
        _, place, kind = rest.split(".")
        rest = f"backbone.{int(place) // 2}.{kind}"
    return f"cells.{cell}.{rest}"


def ltc_names(name: str) -> str:
    return name.removeprefix("rnn_cell.")


def by_cells(theirs: nn.Module, x: Tensor, timespans: Tensor | None, state: Tensor, memory: Tensor | None):
    """All steps of one of ncps's networks, each with time spans (B, 1); outputs, last state, last memory."""
    outputs = []
    for t in range(x.shape[1]):
        span = 1.0 if timespans is None else timespans[:, t, None]
        if memory is not None:
            state, memory = theirs.lstm(x[:, t], (state, memory))
        y, state = theirs.rnn_cell(x[:, t], state, span)
        outputs.append(theirs.fc(y) if isinstance(theirs, ncps.torch.CfC) else y)
    return torch.stack(outputs, 1), state, memory


def agree(ours: Mixer, theirs: nn.Module, names: Names, dtype: torch.dtype, timed: bool) -> None:
    """The same outputs, last state and gradients of the input, the time spans and every parameter."""
    theirs.double()
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    with torch.no_grad():  # biases and constants off their zeros and ones
        for p in theirs.parameters():
            if p.requires_grad and p.ndim == 1:
                p += 0.05 * normal(*p.shape).abs()
    ours.to(dtype).load_state_dict({names(k): v for k, v in theirs.state_dict().items()})
    x = normal(B, T, D)
    spans = 2 * torch.rand(B, T, generator=rng, dtype=torch.float64) if timed else None
    memory = torch.zeros(B, ours.d_hidden, dtype=torch.float64) if getattr(ours, "lstm", None) else None
    results = []
    for side, kind in ((ours, dtype), (theirs, torch.float64)):
        inputs = [part.to(kind, copy=True).requires_grad_() for part in (x, spans) if part is not None]
        if side is ours:
            y, state = ours(inputs[0], None, Context(timespans=inputs[1] if timed else None))
            parameters = dict(ours.named_parameters())
        else:
            start = torch.zeros(B, ours.d_hidden, dtype=torch.float64)
            y, *state = by_cells(theirs, inputs[0], inputs[1] if timed else None, start, memory)
            parameters = {names(k): p for k, p in theirs.named_parameters() if p.requires_grad}
        named = sorted(parameters)
        seeds = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(kind)
        grads = torch.autograd.grad(y, [*inputs, *(parameters[n] for n in named)], seeds)
        found = zip(["outputs", "state", "x", *["spans"] * timed, *named], [y, state[0], *grads], strict=True)
        results.append(dict(found))
    largest = max(g.abs().max() for n, g in results[1].items() if n not in ("outputs", "state"))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        actual = results[0][name].double()
        scale = expected.abs().max() if name in ("outputs", "state") else max(expected.abs().max(), 0.01 * largest)
        error = ((actual - expected).abs().max() / scale).item()
        print(f"{name}: {error:.1e}")
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["default", "pure", "no_gate"])
def test_cfc(mode, dtype, timed):
    theirs = ncps.torch.CfC(D, 24, D, mode=mode, backbone_units=20, backbone_layers=2)
    ours = zoo.create_mixer("cfc", D, d_hidden=24, mode=mode, backbone_units=20, backbone_layers=2)
    agree(ours, theirs, cfc_names, dtype, timed)


@pytest.mark.parametrize("activation", ["lecun_tanh", "tanh", "relu", "silu", "gelu"])
def test_cfc_activations(activation):
    theirs = ncps.torch.CfC(D, D, activation=activation)
    ours = zoo.create_mixer("cfc", D, backbone_activation=activation)
    agree(ours, theirs, cfc_names, torch.float32, timed=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cfc_without_backbone(dtype):
    theirs = ncps.torch.CfC(D, D, backbone_layers=0)
    agree(zoo.create_mixer("cfc", D, backbone_layers=0), theirs, cfc_names, dtype, timed=True)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cfc_with_mixed_memory(dtype, timed):
    theirs = ncps.torch.CfC(D, D, mixed_memory=True)
    agree(zoo.create_mixer("cfc", D, mixed_memory=True), theirs, cfc_names, dtype, timed)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["default", "pure", "no_gate"])
def test_wired_cfc(mode, dtype, timed):
    theirs = ncps.torch.CfC(D, wirings.AutoNCP(28, 6), D, mode=mode)
    ours = zoo.create_mixer("cfc", D, d_hidden=28, wiring="auto_ncp", n_motor=6, mode=mode)
    agree(ours, theirs, cfc_names, dtype, timed)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positivity", ["softplus", "clip"])
def test_ltc(positivity, dtype, timed):
    theirs = ncps.torch.LTC(D, D, implicit_param_constraints=positivity == "softplus")
    agree(zoo.create_mixer("ltc", D, positivity=positivity), theirs, ltc_names, dtype, timed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wired_ltc(dtype):
    theirs = ncps.torch.LTC(D, wirings.AutoNCP(40, D), ode_unfolds=4)
    ours = zoo.create_mixer("ltc", D, d_hidden=40, wiring="auto_ncp", n_motor=D, unfolds=4)
    agree(ours, theirs, ltc_names, dtype, timed=True)


WIRINGS = {
    "fully_connected": (lambda: wirings.FullyConnected(22, 5), "fully_connected", {"n_motor": 5}),
    "random": (lambda: wirings.Random(22, 5, 0.7), "random", {"n_motor": 5, "sparsity": 0.7}),
    "another seed": (
        lambda: wirings.Random(22, 5, 0.7, 3),
        "random",
        {"n_motor": 5, "sparsity": 0.7, "wiring_seed": 3},
    ),
    "auto_ncp": (lambda: wirings.AutoNCP(22, 5), "auto_ncp", {"n_motor": 5}),
    "auto_ncp, sparse": (lambda: wirings.AutoNCP(22, 5, 0.9), "auto_ncp", {"n_motor": 5, "sparsity": 0.9}),
    "auto_ncp, dense": (lambda: wirings.AutoNCP(22, 5, 0.1), "auto_ncp", {"n_motor": 5, "sparsity": 0.1}),
    "ncp": (
        lambda: wirings.NCP(10, 8, 4, 3, 4, 6, 2),
        "ncp",
        {"ncp_neurons": (10, 8, 4), "ncp_synapses": (3, 4, 6, 2)},
    ),
}


@pytest.mark.parametrize("d_in", [1, 5, 40])
@pytest.mark.parametrize("name", WIRINGS)
def test_wirings(name, d_in):
    """The same synapses with the same signs from the same seed."""
    make, kind, options = WIRINGS[name]
    theirs = make()
    theirs.build(d_in)
    ours: Wiring = make_wiring("cfc", kind, WiringOptions(**options), d_in, 22)
    assert (ours.inner == theirs.adjacency_matrix).all()
    assert (ours.sensory == theirs.sensory_adjacency_matrix).all()
    assert ours.n_motor == theirs.output_dim
    layers = [theirs.get_neurons_of_layer(i) for i in range(theirs.num_layers)]
    assert [list(neurons) for neurons in ours.layers] == layers
