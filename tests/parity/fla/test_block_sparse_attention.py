"""`nsa` and `moba` against flash-linear-attention: its plain forms, and its routing for MoBA."""

from __future__ import annotations

import importlib

import pytest
import torch
from layers import agree, close, layer, ours, stacked

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import attention, block_attention

SIZE = 4
STARTS = [0, 20, 21, 70]


def drawn(T, H, G, K):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, T, heads, K, generator=rng) for heads in (H, G, G)], torch.rand(1, T, H, 3, generator=rng)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_blocks", [3, 6])
def test_nsa(n_blocks, packed):
    T, H, G, K = 90, 4, 2, 8
    (q, k, v), gates = drawn(T, H, G, K)
    naive, scale, size = load_naive("nsa"), K**-0.5, SIZE
    resets = torch.isin(torch.arange(T), torch.tensor(STARTS)).view(1, T) if packed else None
    found = []
    for theirs in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, gates)]
        if theirs:
            pieces = []
            for a, b in zip(STARTS, [*STARTS[1:], T], strict=True) if packed else [(0, T)]:
                q_, k_, v_, g_ = (x[:, a:b] for x in inputs)
                n = -(-(b - a) // size)
                k_mean, v_mean = (
                    torch.cat([x, x.new_zeros(1, n * size - (b - a), *x.shape[2:])], 1).unflatten(1, (n, size)).mean(2)
                    for x in (k_, v_)
                )
                o_cmp, _ = naive.naive_nsa_compression(q_, k_mean, v_mean, size, scale)
                index = naive.naive_nsa_topk(q_, k_mean, n_blocks, size, scale)
                # the padded slots, -1, are keys that the plain form hides
                o_slc = naive.naive_nsa_selection(q_, k_, v_, index, size, scale)
                o_win, _ = attention(q_, k_, v_, window=7)
                pieces.append(g_[..., :1] * o_cmp + g_[..., 1:2] * o_slc + g_[..., 2:] * o_win)
            o = torch.cat(pieces, 1)
        else:
            o, _ = block_attention(
                *inputs[:3], block_size=size, n_blocks=n_blocks, gates=inputs[3], window=7, resets=resets
            )
        (o * torch.linspace(-1, 1, K)).sum().backward()
        found.append([o, *(x.grad for x in inputs)])
    for name, mine, expected in zip(("outputs", "dq", "dk", "dv", "dgates"), *found, strict=True):
        close(mine, expected, name)


def plain_flash(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, **_):
    """What `flash_attn` computes, in plain PyTorch: outputs (T, H, K) and log-sum-exps (H, T)."""
    outputs, totals = [], []
    for i in range(len(cu_seqlens_q) - 1):
        (a, b), (c, d) = (x[i : i + 2].tolist() for x in (cu_seqlens_q, cu_seqlens_k))
        logits = torch.einsum("thk, shk -> hts", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
        if causal:
            logits = logits.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril(), -torch.inf)
        outputs.append(torch.einsum("hts, shk -> thk", logits.softmax(-1), v[c:d]))
        totals.append(logits.logsumexp(-1))
    return torch.cat(outputs), torch.cat(totals, 1), None, None


@pytest.mark.parametrize("starts", [[0], STARTS])
@pytest.mark.parametrize("top_k", [2, 4])
def test_moba(monkeypatch, top_k, starts):
    """fla's own routing and combination, with `flash_attn`, which needs a GPU, in plain PyTorch."""
    module = importlib.import_module("fla.ops.moba.parallel")
    monkeypatch.setattr(module, "flash_attn_varlen_func", object())
    monkeypatch.setattr(module, "_flash_attn_varlen_forward", plain_flash)
    T = 90
    (q, k, v), _ = drawn(T, 4, 4, 8)
    documents = torch.tensor([*starts, T], dtype=torch.int32)
    expected = module.parallel_moba(q, k, v, documents, T, SIZE, top_k)
    resets = torch.isin(torch.arange(T), torch.tensor(starts)).view(1, T)
    o, _ = block_attention(q, k, v, block_size=SIZE, n_blocks=top_k, resets=resets)
    close(o, expected, "outputs")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "num_kv_heads": 4}])
def test_moba_layer(monkeypatch, options):
    module = importlib.import_module("fla.ops.moba.parallel")
    monkeypatch.setattr(module, "flash_attn_varlen_func", object())
    monkeypatch.setattr(module, "_flash_attn_varlen_forward", plain_flash)
    theirs = layer("moba", "MoBA", hidden_size=32, num_heads=4, moba_chunk_size=SIZE, moba_topk=3, **options)
    projections = theirs.q_proj, theirs.k_proj, theirs.v_proj
    weights = {"in_proj.weight": stacked(*projections), "out_proj.weight": theirs.o_proj.weight}
    weights["out_norm"] = theirs.o_norm.weight
    if options:
        weights["qkv_bias"] = torch.cat([part.bias for part in projections])
    word = f"moba(n_heads=4, block_size=4, n_blocks=3, out_norm=True, rope_interleaved=False, bias={bool(options)})"
    agree(ours(word, weights, 32), theirs, 32, 42, gradients=False)


@torch.no_grad()
def test_nsa_layer():
    """Without the window, whose kernel is `flash_attn`'s."""
    options = {"num_heads": 16, "num_kv_heads": 1, "head_dim": 16, "block_size": 16, "block_counts": 4}
    theirs = layer("nsa", "NativeSparseAttention", hidden_size=32, window_size=0, **options)
    gates = theirs.g_proj.weight.view(16, 3, 32)[:, :2].reshape(32, 32)  # (compressed, chosen) of each head
    projections = stacked(theirs.q_proj, theirs.k_proj, theirs.v_proj, gates)
    weights = {"in_proj.weight": projections, "out_proj.weight": theirs.o_proj.weight}
    word = "nsa(n_heads=16, head_dim=16, block_size=16, n_blocks=4, window=None, rope_interleaved=False)"
    agree(ours(word, weights, 32), theirs, 32, 120, gradients=False)
