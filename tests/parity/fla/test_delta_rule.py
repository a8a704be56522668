"""The layers around the delta rule against flash-linear-attention's, and its plain PyTorch forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layers import agree, close, layer, ours, stacked

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import delta_rule, dplr

D = 32
CASES = pytest.mark.parametrize(("steps", "negative"), [(9, False), (70, True)])
SHORT = pytest.mark.parametrize(("steps", "negative"), [(9, False), (40, True)])
"""For layers whose chunked kernel takes no float32: up to 64 steps the recurrent one runs."""


def convolved(theirs) -> dict[str, torch.Tensor]:
    return {"conv.weight": stacked(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)}


def projections(theirs, *more) -> dict[str, torch.Tensor]:
    return {"in_proj.weight": stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.b_proj, *more)}


def output(theirs) -> dict[str, torch.Tensor]:
    return {"norm.weight": theirs.o_norm.weight, "out_proj.weight": theirs.o_proj.weight}


def rates(theirs) -> dict[str, torch.Tensor]:
    return {"A_log": theirs.A_log, "dt_bias": theirs.dt_bias}


@SHORT
@pytest.mark.parametrize("gate", [False, True])
def test_deltanet_layer(steps, negative, gate):
    theirs = layer(
        "delta_net", "DeltaNet", hidden_size=D, num_heads=2, use_gate=gate, allow_neg_eigval=negative, norm_eps=1e-5
    )
    weights = projections(theirs, *([theirs.g_proj] if gate else [])) | convolved(theirs) | output(theirs)
    agree(ours(f"deltanet(n_heads=2, gate={gate}, allow_neg_eigval={negative})", weights, D), theirs, D, steps)


@CASES
def test_gated_deltanet_layer(steps, negative):
    options = {"hidden_size": D, "head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 2}
    theirs = layer("gated_deltanet", "GatedDeltaNet", allow_neg_eigval=negative, **options)
    weights = projections(theirs, theirs.a_proj, theirs.g_proj) | convolved(theirs) | output(theirs) | rates(theirs)
    word = f"gated_deltanet(n_heads=2, n_v_heads=4, head_dim=8, allow_neg_eigval={negative})"
    agree(ours(word, weights, D), theirs, D, steps)


@pytest.mark.parametrize(("steps", "negative", "bound"), [(9, False, None), (70, True, None), (70, False, -5.0)])
def test_kda_layer(steps, negative, bound):
    options = {"hidden_size": D, "head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 2}
    options |= {"safe_gate": bound is not None, "lower_bound": bound}
    theirs = layer("kda", "KimiDeltaAttention", allow_neg_eigval=negative, **options)
    weights = projections(theirs, theirs.f_proj[0], theirs.g_proj[0]) | convolved(theirs) | output(theirs)
    weights |= rates(theirs) | {
        "decay_up.weight": theirs.f_proj[1].weight,
        "gate_up.weight": theirs.g_proj[1].weight,
        "gate_up.bias": theirs.g_proj[1].bias,
    }
    word = "kda(n_heads=2, n_v_heads=4, head_dim=8, expand_v=2.0, gate_bias=True"
    # the interpreter does not run the bounded gate's backward kernel
    agree(
        ours(f"{word}, allow_neg_eigval={negative}, lower_bound={bound})", weights, D),
        theirs,
        D,
        steps,
        gradients=bound is None,
    )


@CASES
def test_gated_deltanet2_layer(steps, negative):
    options = {"hidden_size": D, "head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 2}
    theirs = layer("gdn2", "GatedDeltaNet2", allow_neg_eigval=negative, **options)
    more = (theirs.w_proj, theirs.f_proj[0], theirs.g_proj[0])
    weights = projections(theirs, *more) | convolved(theirs) | output(theirs) | rates(theirs)
    weights |= {
        "decay_up.weight": theirs.f_proj[1].weight,
        "gate_up.weight": theirs.g_proj[1].weight,
        "gate_up.bias": theirs.g_proj[1].bias,
    }
    word = f"gated_deltanet2(n_heads=2, n_v_heads=4, head_dim=8, expand_v=2.0, allow_neg_eigval={negative})"
    agree(ours(word, weights, D), theirs, D, steps, gradients=steps < 64)


@pytest.mark.filterwarnings("ignore:The correction_factor")
@pytest.mark.parametrize(("steps", "gate", "inner", "correction"), [(9, True, True, True), (70, False, False, True)])
def test_comba_layer(steps, gate, inner, correction):
    options = {"hidden_size": D, "head_dim": 8, "num_heads": 2, "use_output_gate": gate, "use_inner_decay": inner}
    theirs = layer("comba", "Comba", use_output_correction=correction, **options)
    weights = projections(theirs, theirs.a_proj, *([theirs.g_proj] if gate else []))
    weights |= convolved(theirs) | output(theirs) | rates(theirs) | {"D": theirs.D}
    weights |= {"decay": theirs.decay} if inner else {}
    word = f"comba(n_heads=2, head_dim=8, gate={gate}, inner_decay={inner})"
    agree(ours(word, weights, D), theirs, D, steps)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_as_gated_deltanet2_and_comba(backend):
    """Both are `dplr`, against fla's plain forms: by steps for Gated DeltaNet-2; by chunks for Comba, whose form by
    steps reads after the decay, unlike its kernels and the paper."""
    B, T, H, K, V = 2, 70, 2, 8, 12
    rng = torch.Generator().manual_seed(0)
    q, k, p = (torch.randn(B, T, H, K, generator=rng) for _ in range(3))
    k, p, v = F.normalize(k, dim=-1), F.normalize(p, dim=-1), torch.randn(B, T, H, V, generator=rng)
    g = F.logsigmoid(torch.randn(B, T, H, K, generator=rng) + 2)
    b, w = torch.rand(B, T, H, K, generator=rng), torch.rand(B, T, H, V, generator=rng)
    state = torch.randn(B, H, K, V, generator=rng)
    theirs, last = load_naive("gdn2").naive_recurrent_gdn2(
        q, k, v, g, b, w, initial_state=state, output_final_state=True
    )
    o, ours_last = dplr(q, k, w * v, -g.exp() * b * k, k, g, state, backend=backend)
    close(o, theirs, "gdn2: outputs")
    close(ours_last, last, "gdn2: state")
    beta, g = b[..., 0], g[..., 0]
    theirs, last = load_naive("comba").naive_chunk_comba(
        q, k, v, p, g, beta, initial_state=state, output_final_state=True
    )
    beta = beta[..., None]
    o, ours_last = dplr(q, k, beta * v, -beta * p, k, g, state, backend=backend)
    close(o, theirs, "comba: outputs")
    close(ours_last, last, "comba: state")


@SHORT
@pytest.mark.parametrize("forget_gate", [True, False])
@pytest.mark.parametrize("householders", [1, 3])
def test_deltaproduct_layer(steps, negative, forget_gate, householders):
    theirs = layer(
        "gated_deltaproduct",
        "GatedDeltaProduct",
        hidden_size=D,
        head_dim=8,
        num_heads=2,
        num_householder=householders,
        use_forget_gate=forget_gate,
        allow_neg_eigval=negative,
    )
    more = [theirs.a_proj, theirs.g_proj] if forget_gate else [theirs.g_proj]
    weights = projections(theirs, *more) | convolved(theirs) | output(theirs) | (rates(theirs) if forget_gate else {})
    word = f"deltaproduct(n_householders={householders}, n_heads=2, head_dim=8, forget_gate={forget_gate}"
    agree(ours(f"{word}, allow_neg_eigval={negative})", weights, D), theirs, D, steps, gradients=False)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_op_as_a_product(backend):
    """n steps of the op a token, the decay at the first and the query at the last, are fla's product."""
    B, T, N, H, K, V = 2, 40, 3, 2, 8, 12
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, T, H, K, generator=rng), F.normalize(torch.randn(B, T * N, H, K, generator=rng), dim=-1)
    v, beta = torch.randn(B, T * N, H, V, generator=rng), 2 * torch.rand(B, T * N, H, generator=rng)
    g, state = F.logsigmoid(torch.randn(B, T, H, generator=rng) + 2), torch.randn(B, H, K, V, generator=rng)
    product = load_naive("gated_delta_product").naive_recurrent_gated_delta_product
    theirs, last = product(q, k, v, g, beta, K**-0.5, initial_state=state, num_householder=N)
    spread_q, spread_g = q.new_zeros(B, T, N, H, K), g.new_zeros(B, T, N, H)
    spread_q[:, :, -1], spread_g[:, :, 0] = q, g
    o, ours_last = delta_rule(spread_q.flatten(1, 2), k, v, beta, spread_g.flatten(1, 2), state, backend=backend)
    close(o[:, N - 1 :: N], theirs, "outputs")
    close(ours_last, last, "state")
