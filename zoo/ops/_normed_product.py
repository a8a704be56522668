"""sigmoid(gate) * norm(gate * up): a gated product whose size does not depend on the size of its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops._plain_norm import plain_norm
from zoo.ops._silu_product import fits
from zoo.ops.bridge import Operator
from zoo.ops.kernel import Call, Kernel, suffix

KERNEL = Kernel("normed_product", dtypes=(torch.float32, torch.bfloat16))
EPS = 1e-5


def normed_product(gate: Tensor, up: Tensor) -> Tensor:
    """sigmoid(gate) * norm(gate * up), a `plain_norm` along the last axis: silu(gate) * up with its size taken out.

    In one kernel where there are compiled ones.
    """
    if fits(KERNEL, gate, up):
        return compiled(gate, up)[0]
    return _plain(gate, up)


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate) * plain_norm(gate * up, eps=EPS)


def _forward(call: Call, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the inverse root mean squares of the rows in float32."""
    n = gate.shape[-1]
    n_rows = gate.numel() // n
    y, inverse = torch.empty_like(gate), gate.new_empty(n_rows, dtype=torch.float32)
    call(f"normed_product_forward_{suffix(gate)}", (gate, up), (y, inverse), n_rows, n, EPS)
    return y, inverse


def _backward(call: Call, gate: Tensor, up: Tensor, inverse: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    reads, n = (gate, up, inverse, d_y), gate.shape[-1]
    call(f"normed_product_backward_{suffix(gate)}", reads, (d_gate, d_up), gate.numel() // n, n)
    return d_gate, d_up


compiled = Operator(
    KERNEL,
    "normed_product(Tensor gate, Tensor up) -> (Tensor y, Tensor inverse)",
    _forward,
    _backward,
    gradients="gate up",
    plain=_plain,
)
