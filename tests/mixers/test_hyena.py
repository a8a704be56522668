"""Hyena against the authors' equations, its sizes, and documents in one row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.protocol import Context, mixers

D = 16


def filter_by_hand(m, n_steps: int) -> Tensor:
    """(N, D), one step at a time."""
    c, rows = m.config, []
    L, bands = c.max_length, (c.position_dim - 1) // 2
    frequencies = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    rates = torch.linspace(math.log(100) / c.slow_decay, math.log(100) / c.fast_decay, m.d_model, dtype=torch.float64)
    for i in range(n_steps):
        z = torch.exp(-1j * frequencies * 2 * math.pi * i / L)
        h = torch.cat([torch.tensor([i / (L - 1)]).double(), z.real, z.imag])
        for layer in m.filter[:-1]:
            h = torch.sin(m.frequency * layer(h))
        rows.append(m.filter[-1](h) * (torch.exp(-rates * i / (L - 1)) + c.shift))
    return torch.stack(rows)


def by_hand(m, x: Tensor) -> Tensor:
    """One row x (T, D) of one document."""
    W, T = m.config.conv_size, len(x)
    padded = F.pad(m.in_proj(x), (0, 0, W - 1, 0))
    mixed = m.conv.bias + sum(m.conv.weight[:, w] * padded[w : w + T] for w in range(W))
    after, before, v = mixed.chunk(3, -1)
    u, h = v * before, filter_by_hand(m, T)
    long = torch.stack([sum(h[t - s] * u[s] for s in range(t + 1)) + m.D * u[t] for t in range(T)])
    return m.out_proj(after * long)


def off_inits(**options):
    torch.manual_seed(0)
    mixer = zoo.create_mixer("hyena", D, **options).double()
    for p in mixer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return mixer.requires_grad_(False)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("options", mixers["hyena"].law_cases(), ids=str)
def test_the_equations(options, backend):
    mixer = off_inits(**options | {"backend": backend})
    x = torch.randn(2, 21, D).double()
    torch.testing.assert_close(mixer(x)[0], torch.stack([by_hand(mixer, row) for row in x]))


def test_documents_of_all_lengths_in_one_row():
    mixer = off_inits(backend="chunked")
    x, sizes = torch.randn(1, 70, D).double(), [1, 1, 2, 15, 17, 3, 31]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    resets = torch.zeros(1, 70, dtype=torch.bool)
    resets[0, starts] = True
    alone = [mixer(x[:, a : a + n])[0] for a, n in zip(starts, sizes, strict=True)]
    packed, state = mixer(x, None, Context(resets=resets))
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    assert state.history.length.tolist() == [31]


@torch.no_grad()
def test_a_pass_works_over_what_is_held():
    """Not over the room of the state: filters are as long as its longest row and the new steps."""
    mixer, x, lengths = off_inits(), torch.randn(2, 9, D).double(), []
    mixer.filter[0].register_forward_hook(lambda _, given, out: lengths.append(len(given[0])))
    whole, state = mixer(x)[0], mixer.init_state(2, capacity=400, dtype=torch.float64)
    first, state = mixer(x[:, :5], state)
    second, state = mixer(x[:, 5:6], state)
    third, state = mixer(x[:, 6:], state)
    assert lengths == [9, 5, 6, 9]
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole)


def test_published_size():
    """The authors' example: 512 wide, a filter of width 64 with two inner layers; the state is what was read."""
    with torch.device("meta"):
        mixer = zoo.create_mixer("hyena", 512)
    layer = 4 * 512**2 + 4 * 512 + 3 * 512 * 4
    filters = 3 * 64 + 64 + 2 * (64**2 + 64) + 64 + 64 * 512 + 512
    assert sum(p.numel() for p in mixer.parameters()) == layer + filters
    assert mixer.state_bytes(1, 1000, torch.float32) == 4 * (1000 * 512 + 2 * 3 * 512) + 8


def test_positions_are_the_time_and_pairs():
    with pytest.raises(zoo.UsageError, match="position_dim=4 is not allowed: it should be odd"):
        zoo.create_mixer("hyena(position_dim=4)", D)
