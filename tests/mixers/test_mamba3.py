"""Mamba-3 against the paper: the recurrence written out, its state, inits, sizes, and what rotations can do."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import Context, Place


def turned(x, angles, halves):
    """One key (N,) with its first pairs of channels rotated; pairs are adjacent, or half of N apart."""
    x, half = x.clone(), len(x) // 2
    for i, angle in enumerate(angles):
        a, b = (i, i + half) if halves else (2 * i, 2 * i + 1)
        x[a], x[b] = (
            x[a] * angle.cos() - x[b] * angle.sin(),
            x[a] * angle.sin() + x[b] * angle.cos(),
        )
    return x


def plain(mixer, x):
    """The layer's equations, one step, head and rank at a time, for x (T, D): outputs, and the last S of each head."""
    c = mixer.config
    H, V, N, G, R = mixer.n_heads, mixer.d_inner // mixer.n_heads, c.d_state, c.n_groups, c.rank
    one = x.new_ones(H, R, V)
    up, gate, down = (mixer.mimo_x, mixer.mimo_z, mixer.mimo_o) if R > 1 else (one, one, one)

    def normed(m, weight):
        return m / torch.sqrt((m**2).mean(-1, keepdim=True) + c.norm_eps) * weight

    S, phi = x.new_zeros(H, N, V), x.new_zeros(H, mixer.n_angles)
    k_before, v_before = x.new_zeros(H, R, N), x.new_zeros(H, R, V)
    outputs = []
    for x_t in x:
        z, u, B, C, dt, a, mix, theta = (mixer.in_proj.weight @ x_t).split(mixer.parts)
        z, u, B, C = z.view(H, V), u.view(H, V), B.view(R, G, N), C.view(R, G, N)
        B, C = normed(B, mixer.B_norm.weight), normed(C, mixer.C_norm.weight)
        dt, mix = torch.log(1 + torch.exp(dt + mixer.dt_bias)), torch.sigmoid(mix)
        rate = torch.where(a < 0, 1 / (1 - a), 1 + a) if c.A_activation == "heavy_tail" else torch.log(1 + torch.exp(a))
        rate = rate.clamp(min=c.A_floor)
        S, phi, y = S.clone(), phi.clone(), torch.zeros_like(u)
        k, v = torch.zeros_like(k_before), up * u[:, None]
        for h in range(H):
            phi[h] = phi[h] + math.pi * torch.tanh(theta) * dt[h]
            alpha, g = torch.exp(-rate[h] * dt[h]), h * G // H
            S[h] = alpha * S[h]
            for r in range(R):
                k[h, r] = turned(B[r, g] + mixer.B_bias[h, r], phi[h], R > 1)
                S[h] += (1 - mix[h]) * dt[h] * alpha * torch.outer(k_before[h, r], v_before[h, r])
                S[h] += mix[h] * dt[h] * torch.outer(k[h, r], v[h, r])
            for r in range(R):
                q = turned(C[r, g] + mixer.C_bias[h, r], phi[h], R > 1)
                o, z_r = S[h].T @ q + mixer.D[h] * v[h, r], z[h] * gate[h, r]
                if c.out_norm:
                    o = normed(o, mixer.norm.weight.view(H, V)[h])
                y[h] += o * z_r * torch.sigmoid(z_r) * down[h, r]
        k_before, v_before = k, v
        outputs.append(mixer.out_proj(y.flatten()))
    return torch.stack(outputs), S


def moved(options, d_model=16):
    mixer = zoo.create_mixer("mamba3", d_model, **options).double()
    for p in mixer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return mixer


CASES = [
    *zoo.protocol.mixers["mamba3"].law_cases(),
    {"d_state": 8, "rank": 3, "A_floor": 0.02},
    {"d_state": 6, "out_norm": True, "head_dim": 4},
]


@torch.no_grad()
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_paper_written_out(options):
    mixer = moved(options)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y, state = mixer(x)
    rows, memories = zip(*(plain(mixer, row) for row in x), strict=True)
    torch.testing.assert_close(y, torch.stack(rows))
    torch.testing.assert_close(state.ssm, torch.stack(memories))


@torch.no_grad()
def test_the_angle_stays_within_a_turn_and_exact():
    """5,000 steps in float32, each of which turns by up to half a turn: every pair is where float64's is."""
    mixer = zoo.create_mixer("mamba3(d_state=8, head_dim=16, dt_init_range=[0.9, 1.0])", 16)
    x = torch.randn(1, 5_000, 16)
    angle = mixer(x)[1].angle
    exact = mixer.double()(x.double())[1].angle
    assert angle.abs().max() <= math.pi + 1e-6
    turns = (angle - exact) / (2 * math.pi)
    assert (turns - turns.round()).abs().max() < 1e-4


@torch.no_grad()
def test_a_row_without_steps_keeps_its_state():
    """The last key waits for the next step's size: a pass of which a row has no valid step must not write it."""
    mixer = moved({"d_state": 6, "rank": 2})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    _, state = mixer(x)
    _, after = mixer(x, zoo.fork(state), Context(lengths=torch.tensor([0, 3])))
    for kept, was in zip(after, state, strict=True):
        assert torch.equal(kept[0], was[0])
        assert not torch.equal(kept[1], was[1])


@torch.no_grad()
def test_rotations_track_parity():
    """Token 2 writes a value; each token 1 turns the state by half a turn, each token 0 by none: the sign of what is
    read is the parity of the ones. Without the rotation no sign changes."""
    mixer = zoo.create_mixer("mamba3(d_state=2, expand=1.0, head_dim=16, rope_fraction=1.0, A_floor=0.0)", 16).double()
    for p in mixer.parameters():
        p.zero_()
    z, u, _, _, _, rate, _, theta = mixer.in_proj.weight.split(mixer.parts)
    z[0, :3] = 1.0
    u[0, 2] = 1.0
    rate[0, :3] = -800.0  # no decay
    theta[0, 1] = math.atanh(0.5)
    mixer.dt_bias.fill_(math.log(math.expm1(2.0)))  # steps of 2, which turn by 2 * 0.5 * pi
    mixer.B_bias[0, 0, 0] = mixer.C_bias[0, 0, 0] = 1.0
    mixer.out_proj.weight[0, 0] = 1.0
    bits = torch.randint(0, 2, (2, 2000), generator=torch.Generator().manual_seed(0))
    tokens = F.one_hot(torch.cat([torch.full((2, 1), 2), bits], 1), 16).double()
    y = mixer(tokens)[0][:, 1:, 0]
    assert torch.equal(y < 0, (bits.cumsum(1) % 2).bool())
    assert y.abs().min() > 0.99 * y.abs().max() > 0  # nothing fades
    theta.zero_()
    assert (mixer(tokens)[0][:, 1:, 0] > 0).all()


def test_inits_are_the_published_ones():
    mixer = zoo.create_mixer("mamba3(head_dim=2, d_state=8, rank=4)", 512, place=Place(n_layers=16))
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() * (1 + 1e-4) >= 1e-3
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.2  # log-uniform: the median is the geometric mean
    for ones in (mixer.D, mixer.B_bias, mixer.C_bias, mixer.mimo_z, mixer.B_norm.weight, mixer.C_norm.weight):
        assert (ones == 1).all()
    assert (mixer.mimo_x == 0.25).all()
    assert (mixer.mimo_o == 0.25).all()
    assert 0.9 / math.sqrt(16 * 1024) < mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(16 * 1024)


def test_published_sizes():
    """The widths of `mamba_ssm`'s layer at 768, SISO and MIMO of rank 4."""
    with torch.device("meta"):
        siso, mimo = (zoo.create_mixer(f"mamba3(head_dim=64, rank={rank})", 768) for rank in (1, 4))
    assert sum(siso.parts) == 2 * 1536 + 2 * 128 + 3 * 24 + 32
    assert sum(mimo.parts) == 2 * 1536 + 8 * 128 + 3 * 24 + 32
    small = 2 * 24 + 2 * 128  # dt_bias, D, the two norms
    assert sum(p.numel() for p in siso.parameters()) == 768 * (3432 + 1536) + small + 2 * 24 * 128
    assert sum(p.numel() for p in mimo.parameters()) == 768 * (4200 + 1536) + small + 4 * (2 * 24 * 128 + 3 * 24 * 64)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mamba3(head_dim=5)", "head_dim=5 does not divide expand * d_model = 128"),
        ("mamba3(n_groups=3)", "n_groups=3 does not divide the number of heads, 2"),
        ("mamba3(d_state=2)", "rope_fraction=0.5 of d_state=2 holds no pair of channels"),
        ("mamba3(d_state=7, rank=2)", "d_state=7 is odd"),
        ("mamba3(dt_init_range=[0.1, 0.01])", "dt_init_range=[0.1, 0.01] is not allowed"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
