"""silu(gate) * up, number by number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._gated_norm import FEW_NUMBERS
from zoo.ops.bridge import Operator
from zoo.ops.kernel import Call, Kernel, suffix

KERNEL = Kernel("silu_product", dtypes=(torch.float32, torch.bfloat16))


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; in one pass over memory where there are compiled kernels."""
    if fits(KERNEL, gate, up):
        return compiled(gate, up)
    return F.silu(gate) * up


def fits(kernel: Kernel, gate: Tensor, up: Tensor) -> bool:
    """Whether a kernel for products of gates takes these."""
    alike = gate.shape == up.shape and gate.dtype == up.dtype
    return alike and gate.numel() > FEW_NUMBERS and kernel.why_not(gate, up) is None


def _forward(call: Call, gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    call(f"silu_product_forward_{suffix(gate)}", (gate, up), (y,), gate.numel())
    return y


def _backward(call: Call, gate: Tensor, up: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    call(f"silu_product_backward_{suffix(gate)}", (gate, up, d_y), (d_gate, d_up), gate.numel())
    return d_gate, d_up


compiled = Operator(
    KERNEL,
    "silu_product(Tensor gate, Tensor up) -> Tensor y",
    _forward,
    _backward,
    gradients="gate up",
    plain=lambda gate, up: F.silu(gate) * up,
)
