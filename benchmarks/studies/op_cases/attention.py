"""Softmax attention in its kinds, beside torch's own function and flash-linear-attention's plain PyTorch forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, Function, Inputs, load_naive, whole_case
from zoo.ops import SparseIndex, attention, block_attention, latent_attention, sparse_latent_attention

B, T, H, K = 2, 1024, 4, 64
WINDOW = 128
N, P, V, LATENT = 48, 16, 64, 128  # of latent attention: a key's own channels, its rotary ones, values, the latent
FEW, INDEX_HEADS, INDEX_WIDTH, TOP_K = 512, 4, 32, 64  # steps and choice of sparse attention
BLOCK, BLOCKS = 32, 4
FORMS = ("chunked", "reference")


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    qkv = {name: normal(B, T, H, K) for name in "qkv"}
    forgetting = qkv | {"log_decay": F.logsigmoid(normal(B, T, H) + 3)}
    latents = {"q": normal(B, T, H, N + P), "latent": normal(B, T, LATENT), "key": normal(B, T, P)}
    latents |= {"expand": LATENT**-0.5 * normal(H, N + V, LATENT)}
    sparse = {name: x[:, :FEW] if name != "expand" else x for name, x in latents.items()}
    # no products below zero: they would tie, and of equals the peer chooses others
    sparse |= {"index_q": normal(B, FEW, INDEX_HEADS, INDEX_WIDTH).abs()}
    sparse |= {"index_key": normal(B, FEW, INDEX_WIDTH).abs()}
    sparse |= {"index_weight": normal(B, FEW, INDEX_HEADS)}
    gates = {"gates": normal(B, T, H, 3).sigmoid()}
    group = {"q": qkv["q"], "k": qkv["k"][:, :, :1].clone(), "v": qkv["v"][:, :, :1].clone()}
    torch_name = "torch scaled_dot_product_attention"
    return {
        "attention, causal": whole_case(
            lambda backend, **x: attention(**x, backend=backend)[0],
            qkv,
            FORMS,
            peer=lambda: _sdpa,
            peer_name=torch_name,
        ),
        f"attention, window {WINDOW}": whole_case(
            lambda backend, **x: attention(**x, window=WINDOW, backend=backend)[0],
            qkv,
            FORMS,
            peer=lambda: lambda x: _sdpa(x, _band()),
            peer_name=f"{torch_name}, a mask",
        ),
        "attention, forgetting": whole_case(
            lambda backend, **x: attention(**x, backend=backend)[0],
            forgetting,
            FORMS,
            peer=_forgetting,
            peer_name="fla forgetting_attn",
        ),
        f"latent_attention, latent {LATENT}": whole_case(
            lambda backend, **x: latent_attention(**x, backend=backend)[0],
            latents,
            FORMS,
            peer=lambda: lambda x: _sdpa(_expanded(x)),
            peer_name=f"{torch_name}, expanded",
        ),
        f"sparse_latent_attention, {TOP_K} of {FEW}": whole_case(
            _sparse, sparse, FORMS, peer=_dsa, peer_name="fla dsa", at_least=1
        ),
        f"block_attention, {BLOCKS} blocks of {BLOCK} (moba)": whole_case(
            lambda backend, **x: block_attention(**x, block_size=BLOCK, n_blocks=BLOCKS, backend=backend)[0],
            qkv,
            FORMS,
            peer=lambda: _sdpa,
            peer_name=f"{torch_name} to all keys, another function",
        ),
        f"block_attention, gated, {BLOCKS} blocks of {BLOCK} (nsa)": whole_case(
            lambda backend, **x: block_attention(
                **x, block_size=BLOCK, n_blocks=BLOCKS, window=WINDOW, backend=backend
            )[0],
            group | gates,
            FORMS,
            peer=lambda: _all_keys,
            peer_name=f"{torch_name} to all keys, another function",
        ),
    }


def _sdpa(x: Inputs, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return (F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2),)


def _band() -> Tensor:
    lag = torch.arange(T)[:, None] - torch.arange(T)
    return (lag >= 0) & (lag < WINDOW)


def _expanded(x: Inputs) -> Inputs:
    both = torch.einsum("btr, hnr -> bthn", x["latent"], x["expand"])
    key = x["key"][:, :, None].expand(-1, -1, H, -1)
    return {"q": x["q"], "k": torch.cat([both[..., :N], key], -1), "v": both[..., N:]}


def _all_keys(x: Inputs) -> tuple[Tensor, ...]:
    k, v = (x[name].expand(-1, -1, H, -1) for name in "kv")
    return tuple(o * x["gates"].sum(-1, keepdim=True) for o in _sdpa({"q": x["q"], "k": k, "v": v}))


def _forgetting() -> Function:
    naive = load_naive("forgetting_attn").naive_forgetting_attn
    return lambda x: (naive(x["q"], x["k"], x["v"], x["log_decay"]),)


def _sparse(index_q: Tensor, index_key: Tensor, index_weight: Tensor, backend: str, **x: Any) -> Tensor:
    index = SparseIndex(index_q, index_key, index_weight)
    return sparse_latent_attention(**x, index=index, top_k=TOP_K, backend=backend)[0]


def _dsa() -> Function:
    naive = load_naive("dsa").naive_dsa

    def run(x: Inputs) -> tuple[Tensor, ...]:
        index = (x[f"index_{name}"] for name in ("q", "key", "weight"))
        return (naive(*_expanded(x).values(), *index, topk=TOP_K),)

    return run
