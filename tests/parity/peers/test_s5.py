"""S5 against s5-pytorch, weights copied: outputs, states, time spans, steps and gradients."""

from __future__ import annotations

import pytest
import torch
from s5.s5_model import S5SSM
from torch import Tensor

import zoo
from zoo.protocol import Context, Mixer

B, T, D, P = 3, 40, 16, 12
TOLERANCE = {torch.complex128: 1e-9, torch.complex64: 2e-5}


def theirs(ours: Mixer, dtype: torch.dtype) -> S5SSM:
    """Their layer with the weights of ours, which has all states (`conj_sym=False`)."""
    eye = torch.eye(P, dtype=torch.complex64)
    layer = S5SSM(eye[0], eye, eye, D, P, 0.001, 0.1, bcInit="dense", discretization=ours.config.discretization)
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    rows, columns = ours.in_proj.weight.detach(), ours.out_proj.weight.detach()
    layer.Lambda = torch.nn.Parameter(torch.complex(ours.Lambda_re, ours.Lambda_im).detach().to(dtype))
    layer.B = torch.nn.Parameter(torch.stack([rows[::2], rows[1::2]], -1).to(real))
    layer.C = torch.nn.Parameter(torch.complex(columns[:, ::2], -columns[:, 1::2]).to(dtype))
    layer.D = torch.nn.Parameter(ours.D.detach().to(real))
    layer.log_step = torch.nn.Parameter(ours.log_step.detach().to(real))
    if dtype == torch.complex128:  # it casts B to complex64
        layer.get_BC_tilde = lambda: (torch.complex(layer.B[..., 0], layer.B[..., 1]), layer.C)
    return layer


def gradients_as_ours(layer: S5SSM, out: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    names = ["Lambda", "B", "C", "D", "log_step"]
    found = torch.autograd.grad(out, [x, *(getattr(layer, n) for n in names)], weight)
    d = dict(zip(["x", *names], found, strict=True))
    C = torch.stack([d["C"].real, -d["C"].imag], 2).flatten(1)
    return {
        "x": d["x"],
        "Lambda_re": d["Lambda"].real,
        "Lambda_im": d["Lambda"].imag,
        "in_proj.weight": d["B"].permute(0, 2, 1).flatten(0, 1),
        "out_proj.weight": C,
        "D": d["D"],
        "log_step": d["log_step"],
    }


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_outputs_states_and_gradients(discretization, timed, dtype):
    torch.manual_seed(0)
    word = f"s5(d_state={P}, conj_sym=False, clip_eigs=False, activation=None, discretization='{discretization}')"
    ours = zoo.create_mixer(word, D).double()
    layer = theirs(ours, dtype)
    ours = ours.to(torch.float64 if dtype == torch.complex128 else torch.float32)
    x = torch.randn(B, T, D, dtype=ours.D.dtype, requires_grad=True)
    spans = 0.5 + torch.rand(B, T, dtype=ours.D.dtype)
    weight = torch.randn(B, T, D, dtype=ours.D.dtype)

    outputs, states = [], []
    for row, span in zip(x, spans, strict=True):  # their batches are made by vmap, which their own states do not pass
        y, h = layer(row, step_scale=span if timed else 1.0, return_state=True)
        outputs.append(y)
        states.append(h)
    expected, last = torch.stack(outputs), torch.stack(states)
    y, state = ours(x, None, Context(timespans=spans) if timed else None)
    tolerance = TOLERANCE[dtype] * (10 if dtype == torch.complex64 else 1)  # exp(z) - 1 cancels in theirs
    close(y, expected, tolerance, "outputs")
    close(torch.view_as_complex(state.h.unflatten(1, (-1, 2))), last, tolerance, "last state")
    wanted = gradients_as_ours(layer, expected, x, weight)
    found = torch.autograd.grad(y, [x, *(ours.get_parameter(n) for n in wanted if n != "x")], weight)
    for (name, g), actual in zip(wanted.items(), found, strict=True):
        close(actual, g, tolerance, f"gradient of {name}")


@torch.no_grad()
def test_steps():
    """Their step, which takes a state, from the middle of a sequence."""
    ours = zoo.create_mixer(f"s5(d_state={P}, conj_sym=False, activation=None)", D).double()
    layer = theirs(ours, torch.complex128)
    x = torch.randn(1, T, D).double()
    _, state = ours(x[:, :20])
    h = torch.view_as_complex(state.h.unflatten(1, (-1, 2)))[0].clone()
    for t in range(20, T):
        y, state = ours.step(x[:, t], state)
        expected, h = layer.forward_rnn(x[0, t], h)
        torch.testing.assert_close(y[0], expected)
