"""A backward pass inside an autocast block is as exact as one outside."""

import pytest
import torch
from torch import Tensor

import zoo

WORDS = ["deltanet", "gated_deltanet", "mamba2", "short_conv", "gqa", 'gqa(backend="chunked")']


@pytest.mark.parametrize("word", WORDS)
def test_backward_inside_autocast(word: str) -> None:
    mixer = zoo.create_mixer(word, d_model=32)
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))

    def gradients(inside: bool) -> list[Tensor]:
        mixer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixer(x)[0].float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [p.grad.clone() for p in mixer.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.linalg.vector_norm(a - b) <= 2e-2 * torch.linalg.vector_norm(b)
