"""Mamba against the paper: the recurrence written out, inits, sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import Place


def plain(mixer, x):
    """The layer's equations, one step, channel and tap at a time, for x (T, D)."""
    W, inner = mixer.config.conv_size, mixer.d_inner
    h = x.new_zeros(inner, mixer.config.d_state)
    past = [x.new_zeros(inner)] * W
    outputs = []
    for x_t in x:
        u, z = (mixer.in_proj(x_t)[:inner], mixer.in_proj(x_t)[inner:])
        past = [*past[1:], u]
        u = sum(mixer.conv.weight[:, w] * past[w] for w in range(W))
        u = F.silu(u if mixer.conv.bias is None else u + mixer.conv.bias)
        parts = list((mixer.x_proj.weight @ u).split(mixer.parts))
        if mixer.config.inner_norm:
            weights = [1] * 3 if mixer.norms is None else [norm.weight for norm in mixer.norms]
            for i, weight in enumerate(weights):
                parts[i] = parts[i] / torch.sqrt((parts[i] ** 2).mean() + mixer.config.norm_eps) * weight
        r, B, C = parts
        dt = torch.log(1 + torch.exp(mixer.dt_proj.weight @ r + mixer.dt_proj.bias))
        o = []
        rows = []
        for d in range(inner):
            rows.append(torch.exp(-torch.exp(mixer.A_log[d]) * dt[d]) * h[d] + dt[d] * u[d] * B)
            o.append((rows[-1] @ C + mixer.D[d] * u[d]) * z[d] * torch.sigmoid(z[d]))
        h = torch.stack(rows)
        outputs.append(mixer.out_proj(torch.stack(o)))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", zoo.protocol.mixers["mamba"].law_cases(), ids=str)
def test_equals_the_paper_written_out(options):
    mixer = zoo.create_mixer("mamba", 16, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = mixer(x)
    torch.testing.assert_close(y, torch.stack([plain(mixer, row) for row in x]))


def test_inits_are_the_published_ones():
    mixer = zoo.create_mixer("mamba", 512, place=Place(n_layers=16))
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(1024, 16))
    steps = F.softplus(mixer.dt_proj.bias)
    assert steps.min() * (1 + 1e-4) >= 1e-3
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.2  # log-uniform: the median is the geometric mean
    assert 0.99 * 32**-0.5 < mixer.dt_proj.weight.abs().max() <= 32**-0.5
    assert (mixer.D == 1).all()
    assert 0.9 / math.sqrt(16 * 1024) < mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(16 * 1024)


def test_number_of_parameters_is_that_of_mamba_130m():
    with torch.device("meta"):
        mixer = zoo.create_mixer("mamba", 768)
    n = sum(p.numel() for p in mixer.parameters())
    assert 24 * (n + 768) + 50280 * 768 + 768 == 129_135_360


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_states_are_kept_chunk_by_chunk_only(backend):
    """A training step keeps far less than the N states of all channels at all steps."""
    T, width, sizes, kept = 512, 64, (4, 64), []
    for n_states in sizes:
        mixer, seen = zoo.create_mixer("mamba", width // 2, d_state=n_states, backend=backend), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, seen=seen: seen.append(x.numel()) or x, lambda x: x):
            mixer(torch.randn(1, T, width // 2))
        kept.append(sum(seen))
    assert kept[1] - kept[0] <= T * width * (sizes[1] - sizes[0]) / 4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mamba(expand=1.51)", "expand * d_model = 1.51 * 64 = 96.64 is not allowed: it should be a whole number"),
        ("mamba(dt_init_range=[0.1, 0.01])", "dt_init_range=[0.1, 0.01] is not allowed"),
        ("mamba(d_state=0)", "d_state"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
