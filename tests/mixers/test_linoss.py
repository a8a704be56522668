"""LinOSS against the authors' equations: the 2 x 2 systems written out, inits, time spans, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import Context


def moved(word, d_model=16):
    mixer = zoo.create_mixer(word, d_model).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return mixer


def system(mixer, span):
    """The matrix M (P, 2, 2) of a step and what multiplies B x (P, 2), as the authors' code has both."""
    c, dt = mixer.config, mixer.dt.sigmoid() * span
    A = mixer.A
    if not c.damping:
        A = A.relu()
        S = 1 / (1 + dt**2 * A)
        if c.discretization == "im":
            M = [1 - dt**2 * A * S, -dt * A * S, dt * S, S]
            f = [M[0] * dt, M[2] * dt]
        else:
            M = [torch.ones_like(A), -dt * A, dt, 1 - dt**2 * A]
            f = [dt, dt**2]
    elif c.discretization == "imex":
        G = mixer.G.relu()
        low = (2 + dt * G - 2 * (1 + dt * G).sqrt()) / dt**2
        high = (2 + dt * G + 2 * (1 + dt * G).sqrt()) / dt**2
        A = low + (A - low).relu() - (A - high).relu()
        S = 1 + dt * G
        M = [1 / S, -dt / S * A, dt / S, 1 - dt**2 / S * A]
        f = [dt / S, dt**2 / S]
    else:
        G = mixer.G.relu()  # theirs goes down to -dt A
        A = G**2 / 4 + (A - G**2 / 4).relu()
        S = 1 + dt * G + dt**2 * A
        M = [1 / S, -dt * A / S, dt / S, (1 + dt * G) / S]
        f = [dt / S, dt**2 / S]
    return torch.stack(M, -1).unflatten(-1, (2, 2)), torch.stack(f, -1)


def loop(mixer, x, spans):
    """One step at a time for x (T, D): outputs, and the last state (2, P), complex."""
    P = mixer.d_state
    B = torch.complex(mixer.in_proj.weight[:P], mixer.in_proj.weight[P:])
    C = torch.complex(mixer.out_proj.weight[:, :P], -mixer.out_proj.weight[:, P:])
    state, outputs = torch.zeros(P, 2, dtype=B.dtype), []
    for x_t, span in zip(x, spans, strict=True):
        M, f = system(mixer, span)
        state = (M.to(B.dtype) @ state[..., None])[..., 0] + f * (B @ x_t.to(B.dtype))[:, None]
        y = (C @ state[:, 1]).real + mixer.D * x_t
        parts = mixer.activation
        if mixer.config.activation is not None:
            g = F.gelu(y, approximate="tanh")
            y = (parts.out1.weight @ g + parts.out1.bias) * torch.sigmoid(parts.out2.weight @ g + parts.out2.bias)
        outputs.append(y)
    return torch.stack(outputs), state.mT


@torch.no_grad()
@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("discretization", ["im", "imex"])
def test_equals_the_authors_equations(discretization, damping):
    """At all steps, with time spans too, and with a hook that keeps the weights from being read."""
    mixer = moved(f"linoss(d_state=7, discretization='{discretization}', damping={damping})")
    x = torch.randn(2, 9, 16).double()
    for timed in (False, True):
        spans = 0.2 + torch.rand(2, 9).double() if timed else torch.ones(2, 9).double()
        rows, last = zip(*(loop(mixer, *row) for row in zip(x, spans, strict=True)), strict=True)
        for hook in (None, mixer.in_proj.register_forward_hook(lambda *_: None)):
            y, state = mixer(x, None, Context(timespans=spans) if timed else None)
            torch.testing.assert_close(y, torch.stack(rows))
            re, im = state.x.chunk(2, -1)
            torch.testing.assert_close(torch.complex(re, im), torch.stack(last))
            if hook is not None:
                hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("discretization", ["im", "imex"])
def test_damped_oscillators_start_on_the_ring(discretization):
    word = (
        f"linoss(d_state=500, damping=True, discretization='{discretization}', radius_range=[0.8, 0.9], max_phase=2.0)"
    )
    mixer = zoo.create_mixer(word, 16).double()
    M, _ = system(mixer, 1.0)
    eigenvalues = torch.linalg.eigvals(M)
    assert 0.8 - 1e-5 <= eigenvalues.abs().min() <= eigenvalues.abs().max() <= 0.9 + 1e-5
    assert abs(eigenvalues.abs().square().mean() - (0.8**2 + 0.9**2) / 2) < 0.01  # uniform by area
    furthest = eigenvalues.abs().acos() if discretization == "im" else 2.0
    share = eigenvalues.angle().abs() / furthest
    assert share.max() <= 1 + 1e-4
    assert abs(share.mean() - 0.5) < 0.05
    assert (mixer.G >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize(("discretization", "timed"), [("im", True), ("im", False), ("imex", False)])
def test_nothing_grows_whatever_is_learned(discretization, timed, damping):
    """The implicit rule whatever the time spans too. What has no stiffness moves on at its speed."""
    mixer = zoo.create_mixer(f"linoss(discretization='{discretization}', damping={damping}, activation=None)", 16)
    for p in (mixer.A, mixer.dt, *([mixer.G] if damping else [])):
        p.copy_(10 * torch.randn_like(p))
    x = torch.zeros(1, 3000, 16)
    x[:, :5] = torch.randn(1, 5, 16)
    several = (torch.rand(1, 3000), 1000 * torch.rand(1, 3000), torch.zeros(1, 3000)) if timed else (None,)
    for spans in several:
        with torch.enable_grad():
            y, _ = mixer(x, None, None if spans is None else Context(timespans=spans))
            gradients = torch.autograd.grad(y[:, :50].sum(), list(mixer.parameters()))
        assert y[:, -100:].abs().max() <= 30 * y[:, 100:200].abs().max() + 1e-3  # 30 times as far, at most
        assert all(g.isfinite().all() for g in gradients)


@torch.no_grad()
def test_imex_keeps_energy_and_im_loses_it():
    """An oscillator that was struck once: the implicit rule lets it fade, the implicit-explicit one does not."""
    x = torch.zeros(1, 2000, 16).double()
    x[0, 0] = 1
    late = {}
    for discretization in ("im", "imex"):
        torch.manual_seed(0)
        y, _ = zoo.create_mixer(f"linoss(discretization='{discretization}', activation=None)", 16).double()(x)
        late[discretization] = (y[0, -500:].abs().max() / y[0, 1:501].abs().max()).item()
    assert late["im"] < 0.7 < late["imex"]


def test_inits_are_the_published_ones():
    stiff = zoo.create_mixer("linoss(d_state=100, A_init_range=[5, 30])", 64).A
    assert 5 <= stiff.min() < 8 < 27 < stiff.max() <= 30
    mixer = zoo.create_mixer("linoss(d_state=4096)", 64)
    for p in (mixer.A, mixer.dt):
        assert 0 <= p.min() < p.max() <= 1
        assert abs(p.mean() - 0.5) < 0.03
    assert abs(mixer.in_proj.weight.abs().max() * math.sqrt(64) - 1) < 1e-3
    assert abs(mixer.out_proj.weight.abs().max() * math.sqrt(4096) - 1) < 1e-3
    assert abs(mixer.D.std() - 1) < 0.4
    assert abs(zoo.create_mixer("linoss(d_state=4096, damping=True)", 64).dt.std() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("linoss(radius_range=[0.5, 0.9])", "radius_range has no effect with damping=False"),
        ("linoss(A_init_range=[0, 2], damping=True)", "A_init_range has no effect with damping=True"),
        ("linoss(A_init_range=[2, 1])", "A_init_range=[2, 1] is not allowed"),
        ("linoss(max_phase=1.0)", "max_phase has no effect with damping=False"),
        ("linoss(damping=True, radius_range=[0, 0.9])", "radius_range=[0, 0.9] is not allowed"),
        ("linoss(discretization='ex')", "discretization"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
