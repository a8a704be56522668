"""Sparse latent attention against flash-linear-attention's plain form, over unfolded keys and values."""

from __future__ import annotations

import pytest
import torch

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import SparseIndex, sparse_latent_attention

T, H, N, P, V, R, J, E = 90, 4, 5, 4, 9, 6, 8, 6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("top_k", [7, 40, 200])
def test_naive(top_k, packed):
    rng = torch.Generator().manual_seed(0)
    B = 1 if packed else 2

    def normal(*shape):
        return torch.randn(B, T, *shape, generator=rng)

    q, latent, key, index = normal(H, N + P), normal(R), normal(P), SparseIndex(normal(J, E), normal(E), normal(J))
    expand = torch.randn(H, N + V, R, generator=rng)
    starts = [0, 20, 21, 70]
    resets = torch.isin(torch.arange(T), torch.tensor(starts)).expand(B, -1) if packed else None
    o, _, _, _ = sparse_latent_attention(q, latent, key, expand, index, top_k=top_k, resets=resets)
    both = torch.einsum("btr, hnr -> bthn", latent, expand)
    k = torch.cat([both[..., :N], key[:, :, None].expand(-1, -1, H, -1)], -1)
    documents = torch.tensor([*starts, T]) if packed else None
    expected = load_naive("dsa").naive_dsa(
        q, k, both[..., N:], *(index.q, index.key, index.weight), topk=top_k, cu_seqlens=documents
    )
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=0)
