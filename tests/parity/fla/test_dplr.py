"""dplr against flash-linear-attention's plain PyTorch forms, step by step and chunked, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import load_naive
from zoo.ops import dplr

B, T, H, K, V = 2, 128, 3, 16, 24


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    kappa = F.normalize(normal(B, T, H, K), dim=-1)
    return {
        "q": normal(B, T, H, K),
        "k": 0.5 * normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "a": -kappa,
        "b": kappa * normal(B, T, H, K).sigmoid(),
        "log_decay": -0.6065 * normal(B, T, H, K).sigmoid(),
        "state": normal(B, H, K, V),
    }


def with_gradients(function, inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    o, state = function(*leaves)
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng) for x in (o, state)]
    return [o, state, *torch.autograd.grad((o, state), leaves, seeds)]


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("form", ["dplr_recurrence", "dplr_chunkwise"])
def test_dplr(inputs, form, backend):
    """Values and all gradients: float32, 2e-5 of the largest entry."""

    def theirs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        *over_time, state = leaves
        o, state = getattr(load_naive("generalized_delta_rule/dplr"), form)(
            *(x.transpose(1, 2) for x in over_time), initial_state=state
        )
        return o.transpose(1, 2), state

    ours = with_gradients(lambda *x: dplr(*x, backend=backend), inputs)
    names = ["o", "last state", *inputs]
    for name, a, b in zip(names, ours, with_gradients(theirs, inputs), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-5 * b.abs().max(), name
