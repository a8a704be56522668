"""What stands around the recurrences: norms, gates, the gated perceptron, token shift; beside torch's own functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, Inputs, plain_case
from zoo.ops import gated_mlp, gated_norm, normed_product, plain_norm, silu_product, token_shift

B, T, D, HIDDEN = 2, 2048, 256, 704


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    x = {"x": normal(B, T, D)}
    mlp = {"gate": D**-0.5 * normal(HIDDEN, D), "up": D**-0.5 * normal(HIDDEN, D), "down": normal(D, HIDDEN) / 26}
    pair = {"gate": normal(B, T, D), "up": normal(B, T, D)}
    torch_peer: dict[str, Any] = {"peer_name": "the same in torch"}
    return {
        f"gated_mlp, width {D}, hidden {HIDDEN}": plain_case(gated_mlp, x | mlp, peer=lambda: _mlp, **torch_peer),
        f"gated_norm, width {D}": plain_case(
            gated_norm, x | {"z": normal(B, T, D), "weight": normal(D)}, peer=lambda: _gated, **torch_peer
        ),
        f"plain_norm, width {D}": plain_case(plain_norm, x, peer=lambda: _norm, **torch_peer),
        f"silu_product, width {D}": plain_case(silu_product, pair, peer=lambda: _silu, **torch_peer),
        f"normed_product, width {D}": plain_case(normed_product, pair, peer=lambda: _normed, **torch_peer),
        f"token_shift, width {D}": plain_case(lambda x: token_shift(x)[0], x, peer=lambda: _shift, **torch_peer),
    }


def _mlp(x: Inputs) -> tuple[Tensor, ...]:
    hidden = F.silu(F.linear(x["x"], x["gate"])) * F.linear(x["x"], x["up"])
    return (F.linear(hidden, x["down"]),)


def _gated(x: Inputs) -> tuple[Tensor, ...]:
    return (F.rms_norm(x["x"], (D,), x["weight"], 1e-5) * F.silu(x["z"]),)


def _norm(x: Inputs) -> tuple[Tensor, ...]:
    return (F.rms_norm(x["x"], (D,), None, 1e-5),)


def _silu(x: Inputs) -> tuple[Tensor, ...]:
    return (F.silu(x["gate"]) * x["up"],)


def _normed(x: Inputs) -> tuple[Tensor, ...]:
    return (torch.sigmoid(x["gate"]) * F.rms_norm(x["gate"] * x["up"], (D,), None, 1e-5),)


def _shift(x: Inputs) -> tuple[Tensor, ...]:
    return (F.pad(x["x"][:, :-1], (0, 0, 1, 0)),)
