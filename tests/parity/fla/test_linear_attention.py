"""Linear attention, retention and GLA against flash-linear-attention: its layers, and its plain PyTorch forms."""

from __future__ import annotations

import pytest
import torch
from layers import agree, close, layer, ours, stacked

from zoo.benchmarks.studies.measure import load_naive
from zoo.mixers.linear_attention import taylor_features
from zoo.ops import linear_attention

B, T, H, K, V = 2, 70, 3, 8, 12
D = 32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [9, 70])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_linear_attention_layer(steps, kv_heads):
    theirs = layer(
        "linear_attn",
        "LinearAttention",
        hidden_size=D,
        num_heads=4,
        num_kv_heads=kv_heads,
        feature_map="elu",
        do_feature_map_norm=True,
        output_norm="identity",
    )
    weights = {"in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj)}
    weights["out_proj.weight"] = theirs.o_proj.weight
    agree(ours(f"linear_attention(n_heads=4, n_kv_heads={kv_heads})", weights, D), theirs, D, steps)


@pytest.mark.parametrize("feature_map", ["identity", "relu"])
def test_linear_attention_layer_without_normaliser(feature_map):
    theirs = layer("linear_attn", "LinearAttention", hidden_size=D, num_heads=2, feature_map=feature_map)
    weights = {"in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj)}
    weights |= {"norm.weight": theirs.norm.weight, "out_proj.weight": theirs.o_proj.weight}
    word = f'linear_attention(n_heads=2, feature_map="{feature_map}", normalize=False)'
    agree(ours(word, weights, D), theirs, D, 70)


def test_based_layer():
    options = {"hidden_size": D, "num_heads": 2, "num_key_value_heads": 2, "feature_dim": 4}
    theirs = layer("based", "BasedLinearAttention", mode="chunk", **options)
    weights = {"in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj)}
    weights["out_proj.weight"] = theirs.o_proj.weight
    agree(ours('linear_attention(feature_map="taylor", feature_dim=4, n_heads=2)', weights, D), theirs, D, 70)


@pytest.mark.parametrize("steps", [9, 70])
def test_retention_layer(steps):
    theirs = layer("multiscale_retention", "MultiScaleRetention", hidden_size=D, num_heads=2)
    weights = {
        "in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj),
        "norm_weight": theirs.g_norm_swish_gate.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }
    word = 'retention(n_heads=2, head_norm="rms", norm_eps=1e-5, rope_interleaved=False)'
    agree(ours(word, weights, D), theirs, D, steps)


@pytest.mark.parametrize("steps", [9, 70])
def test_gla_layer(steps):
    theirs = layer("gla", "GatedLinearAttention", hidden_size=D, num_heads=2)
    down, up = theirs.gk_proj
    weights = {
        "in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj, down, theirs.g_proj),
        "decay_up.weight": up.weight,
        "decay_up.bias": up.bias,
        "norm.weight": theirs.g_norm_swish_gate.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }
    agree(ours("gla(n_heads=2)", weights, D), theirs, D, steps)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_with_a_decay_per_channel(backend):
    q, k, v = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, H, V, seed=2)
    g, state = torch.nn.functional.logsigmoid(normal(B, T, H, K, seed=3) + 2), normal(B, H, K, V, seed=4)
    theirs, last = load_naive("gla").naive_recurrent_gla(q, k, v, g, state, output_final_state=True)
    o, ours_last = linear_attention(q, k, v, g, state, backend=backend)
    close(o, theirs, "outputs")
    close(ours_last, last, "state")


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_with_a_normaliser(backend):
    q, k, v = normal(B, T, H, K).exp(), normal(B, T, H, K, seed=1).exp(), normal(B, T, H, V, seed=2)
    theirs, _ = load_naive("linear_attn").naive_recurrent_linear_attn(q, k, v, normalize=True)
    o, _ = linear_attention(q, k, torch.nn.functional.pad(v, (0, 1), value=1.0), backend=backend)
    close(o[..., :-1] / o[..., -1:], theirs, "outputs")


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_with_fixed_decays(backend):
    q, k, v = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, H, V, seed=2)
    theirs = load_naive("retention").naive_retention(*(x.transpose(1, 2) for x in (q, k, v)))
    g = torch.log1p(-torch.exp2(-5.0 - torch.arange(H))).expand(B, T, H)
    close(linear_attention(q, k, v, g, backend=backend)[0], theirs.transpose(1, 2), "outputs")


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_on_taylor_features(backend):
    q, k, v = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, H, V, seed=2)
    theirs = load_naive("based").naive_parallel_based(*(x.transpose(1, 2) for x in (q, k, v)), use_norm=False)
    o, _ = linear_attention(taylor_features(q), taylor_features(k), v, scale=1.0, backend=backend)
    close(o, theirs.transpose(1, 2), "outputs")
