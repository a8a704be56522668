"""Forgetting attention against flash-linear-attention's layer and its plain PyTorch form."""

from __future__ import annotations

import pytest
import torch
from layers import agree, close, layer, ours, stacked

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import attention

D = 64


@pytest.mark.parametrize("steps", [9, 70])
@pytest.mark.parametrize(("heads", "options"), [(2, {}), (1, {"qk_norm": True, "use_output_gate": True})])
def test_layer(steps, heads, options):
    theirs = layer("forgetting_attn", "ForgettingAttention", hidden_size=D, num_heads=2, num_kv_heads=heads, **options)
    projections = [theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.f_proj]
    weights = {"forget_bias": theirs.f_proj.bias, "out_proj.weight": theirs.o_proj.weight}
    if options:
        projections.append(theirs.g_proj)
        weights |= {"q_norm": theirs.q_norm.weight.view(2, -1), "k_norm": theirs.k_norm.weight.view(heads, -1)}
    weights["in_proj.weight"] = stacked(*projections)
    word = f"fox(n_heads=2, n_kv_heads={heads}, norm_eps=1e-5, qk_norm={bool(options)}, gate={bool(options)})"
    agree(ours(word, weights, D), theirs, D, steps)


@pytest.mark.parametrize("window", [None, 17])
def test_naive(window):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 200, heads, 8, generator=rng) for heads in (4, 2, 2))
    g = torch.nn.functional.logsigmoid(torch.randn(2, 200, 4, generator=rng) + 2)
    weight, found = torch.randn(2, 200, 4, 8, generator=rng), []
    naive = load_naive("forgetting_attn").naive_forgetting_attn
    for op in (
        lambda q, k, v, g: attention(q, k, v, log_decay=g, window=window)[0],
        lambda q, k, v, g: naive(q, k, v, g, window_size=window),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, g)]
        o = op(*inputs)
        (o * weight).sum().backward()
        found.append([o, *(x.grad for x in inputs)])
    for name, mine, expected in zip(("outputs", "dq", "dk", "dv", "dg"), *found, strict=True):
        close(mine, expected, name)
