"""The ops of test-time training and of long convolutions refuse what does not fit, in one line."""

from __future__ import annotations

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import ConvHistory, InnerState, long_conv, ttt

B, T, H, K = 2, 5, 3, 4


def inner(**changed):
    given = {"q": torch.zeros(B, T, H, K), "k": torch.zeros(B, T, H, K), "v": torch.zeros(B, T, H, K)}
    given |= {"rate": torch.zeros(B, T, H), "spread": torch.ones(2), "weights": (torch.zeros(H, K + 1, K),)}
    given |= {"norm": (torch.ones(H, K), torch.zeros(H, K))}
    return ttt(**given | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(B, T, K)}, "q has shape"),
        ({"k": torch.zeros(B, T, H, 5)}, "k has shape"),
        ({"rate": torch.zeros(B, T)}, "rate has shape"),
        ({"weights": (torch.zeros(H, K, K),)}, "layer 0 of weights has shape"),
        ({"norm": (torch.ones(K), torch.zeros(H, K))}, "norm's weight has shape"),
        ({"v": torch.zeros(B, T, H, K, dtype=torch.int64)}, "v is torch.int64"),
        ({"state": InnerState(*2 * [(torch.zeros(1, H, K + 1, K),)], torch.zeros(B).long())}, "state has shape"),
        ({"state": InnerState(*2 * [(torch.zeros(B, H, K + 1, K),)], torch.zeros(B))}, "expected torch.int64"),
        ({"backend": "fla"}, "fla"),
    ],
)
def test_inner_training(changed, message):
    inner()
    with pytest.raises(UsageError, match=message) as refused:
        inner(**changed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u": torch.zeros(B, T)}, r"u \(2, 5\)"),
        ({"filters": torch.zeros(T - 1, K)}, "filters of 4 steps, expected 5 at least"),
        ({"state": ConvHistory(torch.zeros(B, 3, K), torch.full((B,), 3))}, "filters of 5 steps, expected 8"),
        ({"lengths": torch.ones(B)}, "lengths is torch.float32"),
        ({"backend": "compiled"}, "compiled"),
    ],
)
def test_long_convolution(changed, message):
    given = {"u": torch.zeros(B, T, K), "filters": torch.zeros(T, K)}
    long_conv(**given)
    with pytest.raises(UsageError, match=message) as refused:
        long_conv(**given | changed)
    assert "\n" not in str(refused.value)
