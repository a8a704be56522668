"""The RNN with matrix-valued states, beside its step form."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, op_case
from zoo.ops import m2rnn

B, T, H, K, V = 2, 512, 21, 64, 16


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    inputs = {"q": normal(B, T, 1, K), "k": normal(B, T, 1, K), "v": normal(B, T, H, V)}
    inputs |= {"weight": 0.5 * V**-0.5 * normal(H, V, V), "log_decay": -normal(B, T, H).abs()}
    return {"m2rnn, T 512": op_case(m2rnn, inputs, ("compiled", "reference"), counted="reference")}
