"""Parts that several recurrent mixers share: short convolution, gated norm, published inits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.ops import causal_conv1d
from zoo.ops.common import owned
from zoo.ops.modules import bare
from zoo.protocol import Context, Place, derive_heads, packing, recurrent_dtype

Backend = Literal["auto", "reference", "chunked", "compiled", "fla", "flash_qla", "mamba_ssm", "causal_conv1d"]
"""Form of a mixer's main op; one that the op does not have, or that cannot run here, is refused."""

CONVOLUTIONS = ("auto", "reference", "chunked", "compiled", "causal_conv1d")


def conv_backend(backend: Backend) -> Backend:
    """The form of a mixer's short convolution: that of its main op if the convolution has it."""
    return backend if backend in CONVOLUTIONS else "auto"


def main_backend(backend: Backend) -> Backend:
    """The form of a mixer's main op: "causal_conv1d" names the convolution's alone."""
    return "auto" if backend == "causal_conv1d" else backend


def started(position: Tensor, context: Context | None) -> Tensor:
    """(B,) steps of the current document before a pass: those of a state, or where the process's piece begins."""
    if context is None or context.pieces is None:
        return position
    return context.pieces.positions(len(position), context.resets, position.device)


def at_last_step(x: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, ...) at each row's last valid step, in the dtype of `before`, which stands where a row has none."""
    if lengths is None:
        return owned(x[:, -1].to(before.dtype))
    shape = (-1,) + (1,) * (x.ndim - 1)
    at = (lengths - 1).clamp(min=0).view(shape).expand(-1, 1, *x.shape[2:])
    return torch.where((lengths > 0).view(shape[:-1]), x.gather(1, at).squeeze(1).to(before.dtype), before)


def precise(x: Tensor) -> Tensor:
    """x in the dtype of recurrent states, for values that need precision: step sizes, decays, norms."""
    return x.to(recurrent_dtype(x.dtype))


def whole(mixer: str, what: str, value: float) -> int:
    """`value` as a whole number, at least 1.

    Raises:
        UsageError: it is none.
    """
    if value < 1 or not math.isclose(value, round(value), rel_tol=1e-9):
        raise UsageError(f"{mixer}: {what} = {value:g} is not allowed: it should be a whole number, at least 1.")
    return round(value)


def head_widths(mixer: str, d_model: int, n_heads: int | None, expand_k: float, expand_v: float) -> tuple[int, ...]:
    """H, and the widths of a head's keys and values, of keys expand_k * d_model and values expand_v * d_model wide.

    By default the most heads that divide both, up to 4, of 16 key channels each.

    Raises:
        UsageError: a width is not a whole number.
    """
    keys = whole(mixer, f"expand_k * d_model = {expand_k:g} * {d_model}", expand_k * d_model)
    values = whole(mixer, f"expand_v * d_model = {expand_v:g} * {d_model}", expand_v * d_model)
    n_heads = n_heads or derive_heads(math.gcd(keys, values), max(16, keys // 4))
    d_key = whole(mixer, f"{keys} key channels / {n_heads} heads", keys / n_heads)
    return n_heads, d_key, whole(mixer, f"{values} value channels / {n_heads} heads", values / n_heads)


def check_range(mixer: str, option: str, bounds: tuple[float, float], *, zero: bool = False) -> None:
    """`bounds` is [low, high] with 0 < low <= high (0 <= low where `zero`), else a `UsageError`."""
    low, high = bounds
    if not (0 <= low <= high < math.inf and (low or zero)):
        least = "0 <=" if zero else "0 <"
        raise UsageError(
            f"{mixer}: {option}=[{low:g}, {high:g}] is not allowed: it should be [low, high], {least} low <= high."
        )


def project(x: Tensor, layer: nn.Linear, parts: Sequence[int]) -> list[Tensor]:
    """layer(x) cut into `parts`, one product for each that is not 0 wide where nothing is attached to the layer.

    Each part is then a whole block of memory, in the backward pass too, and the odd columns of a few heads do not slow
    down the wide ones: a third less time than one product and a split.
    """
    if not bare(layer):
        return list(layer(x).split(parts, -1))
    biases = [None] * len(parts) if layer.bias is None else layer.bias.split(parts)
    products = [F.linear(x, w, b) if len(w) else None for w, b in zip(layer.weight.split(parts), biases, strict=True)]
    like = next(y for y in products if y is not None)  # autocast sets the dtype
    return [like.new_empty(*x.shape[:-1], 0) if y is None else y for y in products]


class CausalConv(nn.Module):
    """Depthwise causal convolution with torch's own Conv1d init, its state the last W - 1 inputs (B, W - 1, D)."""

    def __init__(self, width: int, size: int, *, bias: bool, activation: Literal["silu"] | None, backend: Backend):
        super().__init__()
        self.activation, self.backend = activation, backend
        self.weight = nn.Parameter(torch.empty(width, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-(size**-0.5), size**-0.5)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None, context: Context | None) -> tuple[Tensor, Tensor]:
        how = {"activation": self.activation, "backend": self.backend, "in_place": True, **packing(context)}
        return causal_conv1d(x, self.weight, self.bias, state, **how)

    def state_shape(self, batch_size: int) -> tuple[int, int, int]:
        width, size = self.weight.shape
        return batch_size, size - 1, width


def step_bias(n: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Biases b whose step sizes softplus(b) are log-uniform in [low, high] (Gu and Dao 2023, section 3.6)."""
    if _counted_only():
        return torch.empty(n)
    dt = torch.exp(torch.rand(n) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def log_rates(n: int, low: float, high: float) -> Tensor:
    """Logarithms of decay rates uniform in [low, high]; a rate of exactly 0 has none and is lifted."""
    rates = torch.empty(n)
    return rates if _counted_only() else rates.uniform_(low, high).clamp(min=1e-6).log()


def _counted_only() -> bool:
    """Whether what is made has no numbers: on the meta device, where each operator takes a millisecond for them."""
    return torch.get_default_device().type == "meta"


def init_projections(in_proj: nn.Linear, out_proj: nn.Linear, place: Place) -> None:
    """Normal with std fan_in^-0.5, the output scaled down by the root of the number of residual steps.

    The published std of 0.02 is that of a width of about 2,000 under this rule; at the widths of small models a fixed
    0.02 would start them near zero. Output: GPT-2's 1 / sqrt(2 n_layers), two residual steps a layer.
    """
    nn.init.normal_(in_proj.weight, std=in_proj.in_features**-0.5)
    nn.init.normal_(out_proj.weight, std=(2 * place.n_layers * out_proj.in_features) ** -0.5)
    for layer in (in_proj, out_proj):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
