"""DPLR as RWKV-7 uses it, beside the plain PyTorch chunked form of flash-linear-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.benchmarks.studies.measure import Case, Function, load_naive, op_case
from zoo.ops import dplr

B, T, H, K, V = 2, 2048, 4, 64, 64
FORMS = ("compiled", "chunked")


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    kappa = F.normalize(normal(B, T, H, K), dim=-1)
    inputs = {
        "q": normal(B, T, H, K),
        "k": 0.5 * normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "a": -kappa,
        "b": kappa * normal(B, T, H, K).sigmoid(),
        "log_decay": -0.6065 * normal(B, T, H, K).sigmoid(),
    }

    def peer() -> Function:
        module = load_naive("generalized_delta_rule/dplr")
        return lambda x: (module.dplr_chunkwise(*(t.transpose(1, 2) for t in x.values()))[0].transpose(1, 2),)

    case = op_case(dplr, inputs, FORMS, peer=peer, peer_name="fla generalized_delta_rule/dplr", at_least=8)
    return {"dplr, decay per channel": case}
