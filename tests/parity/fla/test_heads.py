"""Ops over heads against flash-linear-attention's plain PyTorch forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import delta_rule, linear_attention

B, T, H, K, V = 2, 128, 3, 16, 24


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float32)

    return {
        "q": normal(B, T, H, K),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "beta": normal(B, T, H).sigmoid(),
        "log_decay": F.logsigmoid(normal(B, T, H) + 3),
    }


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_gated_delta_rule(inputs, backend):
    q, k, v, beta, g = inputs.values()
    theirs, _ = load_naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta, g)
    close(delta_rule(q, k, v, beta, g, backend=backend)[0], theirs)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_delta_rule(inputs, backend):
    q, k, v, beta, _ = inputs.values()
    theirs = load_naive("delta_rule").delta_rule_chunkwise(*(x.transpose(1, 2) for x in (q, k, v, beta)))[0]
    close(delta_rule(q, k, v, beta, backend=backend)[0], theirs.transpose(1, 2))


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_delta_rule_with_a_decay_per_channel(inputs, backend):
    q, k, v, beta, g = inputs.values()
    g = g[..., None] * torch.linspace(0.1, 2, K)
    close(delta_rule(q, k, v, beta, g, backend=backend)[0], load_naive("kda").naive_recurrent_kda(q, k, v, g, beta)[0])


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_linear_attention_with_decay(inputs, backend):
    q, k, v, _, g = inputs.values()
    theirs = load_naive("simple_gla").naive_recurrent_simple_gla(q, k, v, g)[0]
    close(linear_attention(q, k, v, g, backend=backend)[0], theirs)
