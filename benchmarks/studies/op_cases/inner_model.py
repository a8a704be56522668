"""Test-time training with a linear inner model, beside flash-linear-attention's plain PyTorch form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, Function, Inputs, load_naive, whole_case
from zoo.ops import ttt

B, T, H, K, MINI_BATCH, EPS = 2, 1024, 4, 64, 16, 1e-6
RATE = 0.01


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    inputs = {name: normal(B, T, H, K) for name in "qkv"}
    inputs |= {"weight": 1 + 0.1 * normal(H, K), "bias": 0.1 * normal(H, K)}
    inputs |= {"start": 0.02 * normal(H, K, K), "start_bias": 0.02 * normal(H, 1, K)}
    case = whole_case(_ttt, inputs, ("chunked",), counted="chunked", peer=_naive, peer_name="fla ttt", at_least=1)
    return {"ttt, linear inner model": case}


def _ttt(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, start: Tensor, start_bias: Tensor, backend: str
) -> Tensor:
    """One rate at all steps, and no factors on the sums: the peer takes a query's rate for the paper's, a key's."""
    rate, spread, inner = q.new_full((B, T, H), RATE), q.new_ones(MINI_BATCH), torch.cat([start, start_bias], 1)
    o, _ = ttt(q, k, v, rate, spread, (inner,), (weight, bias), eps=EPS, backend=backend)
    return o + F.layer_norm(o, (K,), eps=EPS) * weight + bias


def _naive() -> Function:
    naive = load_naive("ttt").chunk_ttt_linear_ref

    def run(x: Inputs) -> tuple[Tensor, ...]:
        initial = (x[name].expand(B, *x[name].shape).clone() for name in ("start", "start_bias"))
        rate = x["q"].new_full((B, T, H, 1), RATE)
        q = x["q"] * 1.0  # written to
        return (naive(q, x["k"], x["v"], x["weight"], x["bias"], rate, 1.0, EPS, MINI_BATCH, *initial)[0],)

    return run
