"""RMS norm with a gate, as most linear-time mixers end: norm(x) * silu(z), or norm(x * silu(z)) as in Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.kernel import Call, Kernel

ROWS = 64  # of a task of the kernel, which sums the gradients of the weight over each
KERNEL = Kernel("gated_norm", sizes={"ROWS": ROWS})
FEW_NUMBERS = 1 << 14  # up to here the plain form is the faster one


@common.without_autocast
def gated_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    n_groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = True,
) -> Tensor:
    """weight * x / rms(x) * silu(z), or weight * u / rms(u) with u = x * silu(z).

    Args:
        x, z: (..., D), of one floating-point dtype; z None for no gate.
        weight: (D,).
        n_groups: equal parts of D, each with a norm of its own.
        eps: added to the mean square.
        norm_before_gate: which of the two.
    """
    weight = weight.to(x.dtype)
    if x.numel() > FEW_NUMBERS and KERNEL.why_not(x, z, weight) is None:
        return compiled_norm(x, z, weight, n_groups, eps, norm_before_gate)
    return _plain(x, z, weight, n_groups, eps, norm_before_gate)


def _plain(x: Tensor, z: Tensor | None, weight: Tensor, n_groups: int, eps: float, norm_before_gate: bool) -> Tensor:
    gate = None if z is None else F.silu(z)
    if gate is not None and not norm_before_gate:
        x, gate = x * gate, None
    if n_groups == 1:
        y = F.rms_norm(x, weight.shape, weight, eps)
    else:
        parts = x.unflatten(-1, (n_groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight
    return y if gate is None else y * gate


def _norm_forward(call: Call, x, z, weight, n_groups, eps, norm_before_gate) -> Tensor:
    """One pass over memory."""
    y, width = torch.empty_like(x), x.shape[-1]
    numbers = (x.numel() // width, width, n_groups, not norm_before_gate, eps)
    call("gated_norm_forward", (x, z, weight), (y,), *numbers)
    return y


def _norm_backward(call: Call, x, z, weight, n_groups, eps, norm_before_gate, d_y) -> tuple[Tensor | None, ...]:
    n_rows, width = x.numel() // x.shape[-1], x.shape[-1]
    d_x, d_z, d_weight = (
        torch.empty_like(x),
        None if z is None else torch.empty_like(x),
        x.new_empty(-(-n_rows // ROWS), width),
    )
    numbers = (n_rows, width, n_groups, not norm_before_gate, eps)
    call("gated_norm_backward", (x, z, weight, d_y), (d_x, d_z, d_weight), *numbers)
    return d_x, d_z, d_weight.sum(0)


compiled_norm = Operator(
    KERNEL,
    "gated_norm(Tensor x, Tensor? z, Tensor weight, int n_groups, float eps, bool norm_before_gate) -> Tensor y",
    _norm_forward,
    _norm_backward,
    gradients="x z weight",
    plain=_plain,
)
