"""Oscillators against the package linoss-dynamics, which steps them in NumPy: values, with and without damping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linoss_dynamics import linoss_step

import zoo
from zoo.protocol import Context

D, T = 16, 30


@torch.no_grad()
@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("discretization", ["im", "imex"])
def test_places_and_speeds_of_every_step(discretization, damping):
    """One oscillator after the other, as the package has one step size for all; and with time spans."""
    torch.manual_seed(0)
    word = f"linoss(d_state=5, discretization='{discretization}', damping={damping}, activation=None)"
    mixer = zoo.create_mixer(word, D).double()
    if damping:  # where nothing is projected, as the package projects nothing
        mixer.A.uniform_(0.5, 1.0)
        mixer.G.uniform_(0.1, 0.5)
    x = torch.randn(1, T, D).double()
    for spans in (torch.ones(1, T).double(), 0.5 + torch.rand(1, T).double()):
        drive = mixer.in_proj(x)[0].view(T, 2, 5).numpy()
        state = None
        places, speeds = np.zeros((2, 5)), np.zeros((2, 5))
        for t in range(T):
            _, state = mixer(x[:, t : t + 1], state, Context(timespans=spans[:, t : t + 1]))
            for i in range(2):
                for j in range(5):
                    y, z, _ = linoss_step(
                        places[i, j],
                        speeds[i, j],
                        mixer.A[j].item(),
                        (mixer.dt[j].sigmoid() * spans[0, t]).item(),
                        mode=discretization,
                        u=drive[t, i, j],
                        damping=mixer.G[j].item() if damping else None,
                    )
                    places[i, j], speeds[i, j] = y[0], z[0]
            expected = torch.from_numpy(np.stack([speeds, places])).flatten(1)
            torch.testing.assert_close(state.x[0], expected, rtol=1e-10, atol=1e-12)
