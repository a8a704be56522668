"""The op of TTT-Linear against flash-linear-attention's plain form: outputs, inner weights and gradients."""

from __future__ import annotations

import pytest
import torch
from layers import close

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import ttt

B, T, H, K, N = 2, 48, 3, 8, 16


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_op(backend):
    """One inner rate: theirs takes a query's rate where the paper takes the key's. Theirs adds o itself to the norm."""
    q, k, v = (normal(B, T, H, K, seed=i).requires_grad_() for i in range(3))
    w, b, start, bias = 1 + normal(H, K, seed=3), normal(H, K, seed=4), normal(H, K, K, seed=5), normal(H, 1, K, seed=6)
    initial = (x.expand(B, *x.shape).clone() for x in (start, bias))
    theirs, h, hb = load_naive("ttt").chunk_ttt_linear_ref(
        q * 1.0, k, v, w, b, torch.full((B, T, H, 1), 0.05), 1.0, 1e-6, N, *initial, output_final_state=True
    )
    rate, weights = torch.full((B, T, H), 0.05), torch.cat([start, bias], 1)
    o, state = ttt(q, k, v, rate, torch.ones(N), (weights,), (w, b), backend=backend)
    out = o + torch.nn.functional.layer_norm(o, (K,), eps=1e-6) * w + b
    close(out, theirs, "outputs")
    close(weights + state.moved[0], torch.cat([h, hb], 2), "inner weights")
    assert not state.position.any()
    for name, ours, expected in zip(
        "qkv", *(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, theirs)), strict=True
    ):
        close(ours, expected, f"gradient of {name}")
