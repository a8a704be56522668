"""Linear attention, retention and GLA against flash-linear-attention: its layers, and its plain PyTorch forms."""

from __future__ import annotations

import pytest
import torch
from layers import agree, close, layer, ours, stacked

import zoo
from zoo.benchmarks.studies.measure import load_naive
from zoo.mixers.linear_attention import squared_features, taylor_features
from zoo.ops import linear_attention, slot_scores
from zoo.protocol import Context, Place

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


@pytest.mark.parametrize("width", [4, 16])
def test_rebased_layer(width, monkeypatch):
    """In their plain form, which has the published epsilon, and in float64: weights near 0 are inexact in float32."""
    options = {"hidden_size": D, "num_heads": 2, "num_key_value_heads": 2, "feature_dim": width}
    theirs = layer("rebased", "ReBasedLinearAttention", **options).double()
    weights = {"in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj)}
    weights |= {"affine.weight": theirs.feature_map.gamma, "affine.bias": theirs.feature_map.beta}
    weights["out_proj.weight"] = theirs.o_proj.weight
    mixer = ours(f'linear_attention(feature_map="rebased", feature_dim={width}, n_heads=2)', weights, D).double()
    in_torch = lambda x, *affine: torch.nn.functional.layer_norm(x, x.shape[-1:], *affine)  # noqa: E731
    monkeypatch.setattr("fla.modules.feature_map.layer_norm", in_torch)
    leaves = [normal(2, 70, D).double().requires_grad_() for _ in range(2)]
    outputs = mixer(leaves[0])[0], theirs.forward_reference(leaves[1])
    close(*outputs, "outputs")
    for y in outputs:
        y.square().sum().backward()
    close(*(leaf.grad for leaf in leaves), "gradients")


@pytest.mark.parametrize(("steps", "bounded"), [(9, True), (70, True), (70, False)])
def test_hgrn2_layer(steps, bounded):
    """The second of three layers: the first one leaves the bounds, as their model does."""
    theirs = layer("hgrn2", "HGRN2Attention", hidden_size=D, expand_ratio=16, layer_idx=1, use_short_conv=not bounded)
    weights = {"in_proj.weight": stacked(theirs.q_proj, theirs.f_proj, theirs.i_proj)}
    weights |= {"norm.weight": theirs.g_norm.weight, "out_proj.weight": theirs.o_proj.weight}
    word = "hgrn2(head_dim=16)"
    if not bounded:
        word = 'hgrn2(head_dim=16, conv_size=4, lower_bounds="none")'
        weights["conv.weight"] = stacked(theirs.q_conv1d, theirs.f_conv1d, theirs.i_conv1d)
        agree(ours(word, weights, D), theirs, D, steps)
        return
    logits = normal(3, D)
    bounds = logits.softmax(0).cumsum(0) - logits.softmax(0)[0]
    mixer = zoo.create_mixer(word, D, place=Place(1, 3))
    mixer.load_state_dict(weights)
    first = zoo.create_mixer(word, D, place=Place(0, 3))
    first.load_state_dict({**first.state_dict(), "logits": logits})

    class Bounded(torch.nn.Module):
        def forward(self, x):
            return theirs(x, lower_bound=bounds[1])

    class Second(torch.nn.Module):
        def forward(self, x):
            context = Context()
            first(x, None, context)
            return mixer(x, None, context)

    agree(Second(), Bounded(), D, steps)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_on_squares(backend):
    q, k, v = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, H, V, seed=2)
    theirs = load_naive("rebased").naive_parallel_rebased(*(x.transpose(1, 2) for x in (q, k, v)))
    q, k, v = squared_features(q), squared_features(k), torch.nn.functional.pad(v, (0, 1), value=1.0)
    o, _ = linear_attention(q, k, v, scale=1.0, backend=backend)
    o = o[..., :-1] / (o[..., -1:] + 1e-6 * K**-0.5)
    close(o, theirs.transpose(1, 2), "outputs")


@pytest.mark.parametrize("steps", [9, 70])
def test_rwkv6_layer(steps):
    """Their keys are half as wide as their values."""
    theirs = layer("rwkv6", "RWKV6Attention", hidden_size=D, num_heads=2, proj_low_rank_dim=3, gate_low_rank_dim=5)
    down, up = theirs.x_proj[0], theirs.x_proj[2].weight
    decay = theirs.w_proj.linear.lora
    weights = dict(zip((f"time_maa_{i}" for i in "rwkvg"), theirs.x_bias, strict=True)) | {"time_maa_x": down.mu}
    order = ["rwkvg".index(i) for i in "wkvrg"]
    weights["time_maa_w1"] = down.linear.weight.view(5, -1, D)[order].flatten(0, 1).T
    weights["time_maa_w2"] = up.view(D, 5, -1).permute(1, 2, 0)[order]
    weights |= {"time_decay": decay[2].bias, "time_decay_w1": decay[0].weight.T, "time_decay_w2": decay[2].weight.T}
    weights["time_faaaa"] = theirs.bonus
    for name, projection in (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g")):
        weights[f"{name}.weight"] = getattr(theirs, f"{projection}_proj").linear.weight
    weights |= {"output.weight": theirs.o_proj.weight}
    weights |= {"ln_x.weight": theirs.g_norm.weight, "ln_x.bias": theirs.g_norm.bias}
    word = "rwkv6(head_dim=16, expand_k=0.5, mix_rank=3, decay_rank=5, norm_eps=1e-5)"
    agree(ours(word, weights, D), theirs, D, steps)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_ops_of_slots(backend):
    q, k, v = normal(B, T, H, K), normal(B, T, H, K, seed=1), normal(B, T, H, V, seed=2)
    g = torch.nn.functional.logsigmoid(normal(B, T, H, 5, seed=3) + 2)
    slots, state = -torch.expm1(g), (normal(B, H, K, 5, seed=4), normal(B, H, 5, V, seed=5))
    theirs, last = load_naive("gsa").naive_recurrent_gsa(q, k, v, slots, g, 1.0, state, output_final_state=True)
    scores, keys = slot_scores(q, k, slots, g, state[0].mT.contiguous(), scale=1.0, backend=backend)
    o, values = linear_attention(scores.softmax(-1), slots, v, g, state[1], scale=1.0, backend=backend)
    close(o, theirs, "outputs")
    close(keys.mT, last[0], "keys")
    close(values, last[1], "values")


@pytest.mark.parametrize(("steps", "kv_heads", "conv"), [(9, 4, False), (70, 2, True)])
def test_gsa_layer(steps, kv_heads, conv):
    options = {"hidden_size": D, "num_heads": 4, "num_kv_heads": kv_heads, "num_slots": 16, "use_short_conv": conv}
    theirs = layer("gsa", "GatedSlotAttention", layer_idx=0, **options)
    weights = {"in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.f_proj)}
    weights |= {"norm.weight": theirs.g_norm.weight, "out_proj.weight": theirs.o_proj.weight}
    if conv:
        weights["conv.weight"] = stacked(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)
    word = f"gsa(n_heads=4, n_kv_heads={kv_heads}, n_slots=16, conv_size={4 if conv else 0})"
    agree(ours(word, weights, D), theirs, D, steps)
