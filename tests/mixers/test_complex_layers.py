"""lru and s5 against their papers: the equations written out, their inits, time spans, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.mixers.s5 import hippo_normal
from zoo.protocol import Context


def moved(word, d_model=16):
    mixer = zoo.create_mixer(word, d_model).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return mixer


def activated(mixer, y):
    """What follows the recurrence, for one step y (D)."""
    kind, parts = mixer.config.activation, mixer.activation
    g = F.gelu(y, approximate="tanh")
    if kind is None:
        return y
    if kind == "gelu":
        return g
    gate = torch.sigmoid(parts.out2.weight @ g + parts.out2.bias)
    value = parts.out1.weight @ g + parts.out1.bias if kind == "full_glu" else g if kind == "half_glu1" else y
    return value * gate


def matrices(mixer):
    """B (P, D) and C (D, P) from the layers that hold their parts; twice C where a state stands for a pair."""
    B = torch.complex(mixer.in_proj.weight[::2], mixer.in_proj.weight[1::2])
    return B, torch.complex(mixer.out_proj.weight[:, ::2], -mixer.out_proj.weight[:, 1::2])


def lru_loop(mixer, x, spans):
    """Equations of section 3 for x (T, D), one step at a time."""
    B, C = matrices(mixer)
    decay = torch.exp(-mixer.nu_log.exp() + 1j * mixer.theta_log.exp())
    h, outputs = torch.zeros_like(decay), []
    for x_t in x:
        h = decay * h + mixer.gamma_log.exp() * (B @ x_t.to(B.dtype))
        outputs.append(activated(mixer, (C @ h).real + mixer.D * x_t))
    return torch.stack(outputs), h


def s5_loop(mixer, x, spans):
    """Equations 2 and 6 for x (T, D), one step at a time."""
    B, C = matrices(mixer)
    eigenvalues = torch.complex(mixer.Lambda_re, mixer.Lambda_im)
    h, outputs = torch.zeros_like(eigenvalues), []
    for x_t, span in zip(x, spans, strict=True):
        step = mixer.log_step.exp() * span
        if mixer.config.discretization == "zoh":
            decay = torch.exp(eigenvalues * step)
            factor = (decay - 1) / eigenvalues
        else:
            left = 1 / (1 - step / 2 * eigenvalues)
            decay, factor = left * (1 + step / 2 * eigenvalues), left * step
        h = decay * h + factor * (B @ x_t.to(B.dtype))
        outputs.append(activated(mixer, (C @ h).real + mixer.D * x_t))
    return torch.stack(outputs), h


CASES = [
    ("lru", lru_loop),
    ("lru(d_state=5, activation='half_glu2')", lru_loop),
    ("s5", s5_loop),
    ("s5(n_blocks=2, activation='full_glu')", s5_loop),
    ("s5(discretization='bilinear', activation='gelu')", s5_loop),
    ("s5(d_state=5, conj_sym=False, activation=None)", s5_loop),
]


@torch.no_grad()
@pytest.mark.parametrize(("word", "loop"), CASES, ids=[word for word, _ in CASES])
def test_equals_the_paper_written_out(word, loop):
    """At all steps, with time spans where they are read, and with a hook that keeps the weights from being read."""
    mixer = moved(word)
    x, spans = torch.randn(2, 9, 16).double(), torch.ones(2, 9).double()
    for timed in (False, True):
        context = None
        if timed:
            spans = 2 * torch.rand(2, 9).double()
            spans[0, 3] = 0
            context = Context(timespans=spans)
            spans = spans if mixer.traits.reads_timespans else torch.ones(2, 9).double()
        rows, last = zip(*(loop(mixer, *row) for row in zip(x, spans, strict=True)), strict=True)
        for hook in (None, mixer.in_proj.register_forward_hook(lambda *_: None)):
            y, state = mixer(x, None, context)
            torch.testing.assert_close(y, torch.stack(rows))
            torch.testing.assert_close(torch.view_as_complex(state.h.unflatten(1, (-1, 2))), torch.stack(last))
            if hook is not None:
                hook.remove()


@torch.no_grad()
def test_padding_may_hold_any_time():
    mixer = moved("s5")
    x, lengths = torch.randn(2, 6, 16).double(), torch.tensor([6, 2])
    spans = torch.rand(2, 6).double()
    expected = mixer(x, None, Context(lengths=lengths, timespans=spans))
    spans[1, 2:] = torch.nan
    with torch.enable_grad():
        y, state = mixer(x, None, Context(lengths=lengths, timespans=spans))
        gradients = torch.autograd.grad(y.sum() + state.h.sum(), list(mixer.parameters()))
    torch.testing.assert_close((y, state.h), (expected[0], expected[1].h))
    assert all(g.isfinite().all() for g in gradients)


def test_two_short_steps_are_a_long_one():
    """In continuous time, with the same input held: zoh is exact whatever the steps."""
    mixer = moved("s5(activation=None)")
    x = torch.randn(1, 1, 16).double().expand(1, 2, 16)
    _, long = mixer(x[:, :1], None, Context(timespans=torch.tensor([[1.7]]).double()))
    _, short = mixer(x, None, Context(timespans=torch.tensor([[0.5, 1.2]]).double()))
    torch.testing.assert_close(long.h, short.h)


@torch.no_grad()
def test_a_long_span_keeps_its_phase_in_float32():
    mixer = zoo.create_mixer("s5(d_state=128, activation=None)", 16)
    x, spans = torch.randn(1, 20, 16), 1000 * torch.rand(1, 20)
    y, _ = mixer(x, None, Context(timespans=spans))
    exact, _ = mixer.double()(x.double(), None, Context(timespans=spans.double()))
    assert (y - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_inits_of_the_lru_are_the_published_ones():
    mixer = zoo.create_mixer("lru(d_state=4096, radius_range=[0.8, 0.9], max_phase=0.5)", 64)
    modulus, angle = torch.exp(-mixer.nu_log.exp()), mixer.theta_log.exp()
    assert 0.8 <= modulus.min() < modulus.max() <= 0.9 + 1e-6
    assert abs(modulus.square().mean() - (0.8**2 + 0.9**2) / 2) < 5e-3  # uniform by area
    assert 0 <= angle.min() < angle.max() <= 0.5 + 1e-6
    torch.testing.assert_close(mixer.gamma_log.exp(), torch.sqrt(1 - modulus**2))
    assert abs(mixer.in_proj.weight.std() * math.sqrt(2 * 64) - 1) < 0.02
    assert abs(mixer.out_proj.weight.std() * math.sqrt(4096) - 1) < 0.02
    assert zoo.create_mixer("lru(radius_range=[1, 1])", 16)(torch.randn(1, 50, 16))[0].isfinite().all()


def test_s5_starts_from_hippo():
    """The eigenvalues and eigenvectors of S = HiPPO-LegS + p p^T, which are those of a normal matrix."""
    n = 12
    i = torch.arange(n).double()
    root = torch.sqrt(2 * i + 1)
    legs = -(torch.outer(root, root).tril(-1) + torch.diag(i + 1))
    normal = legs + torch.outer((i + 0.5).sqrt(), (i + 0.5).sqrt())
    values, vectors = hippo_normal(n)
    torch.testing.assert_close(normal.to(vectors.dtype) @ vectors, vectors * values)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(n, dtype=vectors.dtype))
    assert (values.imag[: n // 2] < 0).all()

    mixer = zoo.create_mixer("s5(d_state=24, n_blocks=2, dt_init_range=[0.01, 0.02])", 512)
    assert mixer.d_state == 12
    torch.testing.assert_close(mixer.Lambda_re, torch.full((12,), -0.5))
    torch.testing.assert_close(mixer.Lambda_im, values.imag[:6].repeat(2).float())
    assert 0.01 <= mixer.log_step.exp().min() <= mixer.log_step.exp().max() <= 0.02 + 1e-6
    B, C = matrices(mixer)
    assert abs(B.abs().square().mean() * 24 - 1) < 0.1
    assert abs((C / 2).abs().square().mean() * 24 - 2) < 0.2  # of two parts


def test_pairs_of_conjugates_are_one_state():
    """With conj_sym, half of the states give the outputs of the real system that all of them make up."""
    torch.manual_seed(0)
    half = zoo.create_mixer("s5(d_state=8, activation=None)", 16).double()
    whole = zoo.create_mixer("s5(d_state=8, conj_sym=False, activation=None)", 16).double()
    with torch.no_grad():
        for name in ("Lambda_re", "Lambda_im", "log_step"):
            p = getattr(half, name)
            getattr(whole, name).copy_(torch.cat([p, -p if name == "Lambda_im" else p]))
        B, C = matrices(half)
        B, C = torch.cat([B, B.conj()]), torch.cat([C, C.conj()], 1) / 2
        whole.in_proj.weight.copy_(torch.stack([B.real, B.imag], 1).flatten(0, 1))
        whole.out_proj.weight.copy_(torch.stack([C.real, -C.imag], 2).flatten(1))
        whole.D.copy_(half.D)
        x = torch.randn(1, 30, 16).double()
        torch.testing.assert_close(whole(x)[0], half(x)[0])


@torch.no_grad()
def test_clipped_eigenvalues_never_grow():
    mixer = zoo.create_mixer("s5(activation=None)", 16)
    mixer.Lambda_re.fill_(1.0)
    x = torch.randn(1, 2000, 16)
    assert mixer(x)[0].abs().max() < 1e3
    free = zoo.create_mixer("s5(activation=None, clip_eigs=False, dt_init_range=[0.1, 0.1])", 16)
    free.Lambda_re.fill_(1.0)
    assert free(x)[0].abs().nan_to_num(1e30).max() > 1e6


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lru(radius_range=[0.9, 0.5])", "radius_range=[0.9, 0.5] is not allowed"),
        ("lru(max_phase=7)", "max_phase"),
        ("lru(activation='glu')", "activation"),
        ("s5(n_blocks=5)", "n_blocks=5 does not divide d_state=64"),
        ("s5(d_state=6, n_blocks=2)", "d_state=6 in n_blocks=2 blocks is odd"),
        ("s5(dt_init_range=[0.1, 0.01])", "dt_init_range=[0.1, 0.01] is not allowed"),
        ("s5(discretization='euler')", "discretization"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
