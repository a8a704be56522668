"""The GRU against torch.nn.GRU, and minGRU against the paper's parallel form in log space."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo

D = 16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference", "fused"])
def test_gru(backend, bias):
    theirs = nn.GRU(D, D, batch_first=True, bias=bias).double()
    ours = zoo.create_mixer("gru", D, backend=backend, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    x, w = torch.randn(3, 50, D, dtype=torch.float64), torch.randn(3, 50, D, dtype=torch.float64)
    (y, state), (expected, h) = ours(x), theirs(x)
    assert (y - expected).abs().max() <= 1e-9
    assert (state.h - h[0]).abs().max() <= 1e-9
    (y * w).sum().backward()
    (expected * w).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-9 * q.grad.abs().max(), name
    for t in range(5):
        y, state = ours.step(x[:, t], state)
        expected, h = theirs(x[:, t : t + 1], h)
        assert (y - expected[:, 0]).abs().max() <= 1e-9


def in_log_space(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The paper's form (appendix B): logarithms cumulated, then summed as exponentials."""
    gate, candidate = mixer.linear_z(x), mixer.linear_h(x)
    log_c = torch.where(candidate >= 0, (F.relu(candidate) + 0.5).log(), F.logsigmoid(candidate))
    decays = F.logsigmoid(-gate).cumsum(1)
    return (decays + (F.logsigmoid(gate) + log_c - decays).logcumsumexp(1)).exp()


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_min_gru(backend):
    """In float64 the forms are one; in float32 ours stays exact where the logarithms have lost their digits."""
    mixer = zoo.create_mixer("min_gru", D, backend=backend).double()
    x = 3 * torch.randn(2, 3000, D, dtype=torch.float64)
    with torch.no_grad():
        exact = in_log_space(mixer, x)
        assert (mixer(x)[0] - exact).abs().max() <= 1e-9 * exact.abs().max()
        mixer.float()
        ours = ((mixer(x.float())[0] - exact).abs() / exact).max().item()
        theirs = ((in_log_space(mixer, x.float()) - exact).abs() / exact).max().item()
    print(f"largest relative error of any one state in float32: {ours:.1e}, in log space {theirs:.1e}")
    assert ours <= 2e-6 < 2e-5 < theirs
