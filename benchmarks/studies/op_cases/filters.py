"""Oscillators and convolutions as long as the sequence, beside torch's FFT."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, Inputs, op_case, whole_case
from zoo.ops import long_conv, oscillate

B, T, D = 2, 2048, 256


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    driven = {"b": normal(B, T, D), "p": normal(B, T, D).sigmoid(), "q": 0.3 * normal(B, T, D).sigmoid()}
    driven |= {"r": 0.3 * normal(B, T, D).sigmoid()}
    filters = normal(T, D) * torch.exp(-torch.arange(T) / 400)[:, None]
    return {
        f"oscillate, width {D}": op_case(oscillate, driven, ("compiled", "chunked")),
        f"long_conv, width {D}": whole_case(
            lambda backend, **x: long_conv(**x, backend=backend)[0],
            {"u": normal(B, T, D), "filters": filters},
            ("chunked",),
            exact="chunked",  # the step form would keep all inputs for every step
            peer=lambda: _fft,
            peer_name="torch.fft",
        ),
    }


def _fft(x: Inputs) -> tuple[Tensor, ...]:
    """As Hyena's authors have it: channels before time."""
    u, filters = x["u"].mT, x["filters"].mT
    spectrum = torch.fft.rfft(u, n=2 * T) * torch.fft.rfft(filters, n=2 * T)
    return (torch.fft.irfft(spectrum, n=2 * T)[..., :T].mT,)
