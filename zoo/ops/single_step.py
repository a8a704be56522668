"""Single steps of a decoder, without gradients: one call of `kernels/step.cpp` each.

An op asks here first when T = 1. `None` means that the step does not run so: gradients are wanted, a graph is traced,
the numbers are no float32 of a CPU, or there are no compiled kernels. Then the op takes its usual way.

With `in_place` the next state is written over the one given, which its owner does not read again. It is the one thing
that these functions change.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from zoo.ops import rotary
from zoo.ops.bridge import steps_alone
from zoo.ops.common import log_form
from zoo.ops.kernel import Kernel
from zoo.ops.rotary import RopeScaling

KERNEL = Kernel("step")
STEPPING = ("auto", "compiled")
"""Names of forms under which a single step runs so."""
FEW_NUMBERS = 1 << 12  # up to here a norm is one call that threads do not share
FEW_ROWS = 4  # up to here products of rows with weights as they lie are faster than torch's, or as fast
FEW_WEIGHTS = 1 << 19  # up to here those of a gated perceptron stay in the caches


def heads_step(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor | None,
    scale: float,
    in_place: bool,
) -> tuple[Tensor, Tensor] | None:
    """A step of linear attention, of the delta rule (`beta`) or of DPLR (`a` and `b`), arguments as of those ops.

    Shapes that do not go together are left to the op, which has words for them.
    """
    if q.ndim != 4 or v.ndim != 4:
        return None
    (B, T, H, V), (_, _, G, K) = v.shape, q.shape
    if T != 1 or not (G and K and V and B) or H % G or q.shape != (B, 1, G, K) or k.shape != q.shape:
        return None
    if state is None:
        state, in_place = v.new_zeros(B, H, K, V), True
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    beta, a, b, g = (x if x is None else x.contiguous() for x in (beta, a, b, g))
    if not steps_alone(KERNEL, q, k, v, g, beta, a, b, state) or state.shape != (B, H, K, V):
        return None
    wide = (B, 1, H, K)
    if a is not None and (b is None or a.shape != wide or b.shape != wide):
        return None
    if beta is not None and beta.shape != (B, 1, H):
        return None
    per_channel = g is not None and g.ndim == 4
    if g is not None and g.shape != (wide if per_channel else (B, 1, H)):
        return None
    o, last = torch.empty_like(v), _next(state, in_place)
    KERNEL.bare("heads_step")(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        address(beta),
        address(a),
        address(b),
        address(g),
        state.data_ptr(),
        o.data_ptr(),
        last.data_ptr(),
        *(B, G, H, K, V, per_channel, torch.get_num_threads(), scale),
    )
    log_form(op, "compiled")
    return o, last


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool, in_place: bool
) -> tuple[Tensor, Tensor] | None:
    """A step of `causal_conv1d`, arguments as there."""
    if x.ndim != 3 or weight.ndim != 2 or x.shape[1] != 1:
        return None
    B, _, D = x.shape
    W, x = weight.shape[1], x.contiguous()
    if not (B and D and W):
        return None
    if state is None:
        state, in_place = x.new_zeros(B, W - 1, D), True
    if not steps_alone(KERNEL, x, weight, bias, state):
        return None
    if len(weight) != D or (bias is not None and bias.shape != (D,)) or state.shape != (B, W - 1, D):
        return None
    y, last = torch.empty_like(x), _next(state, in_place)
    KERNEL.bare("conv_step")(
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        state.data_ptr(),
        y.data_ptr(),
        last.data_ptr(),
        *(B, D, W, silu),
    )
    log_form("causal_conv1d", "compiled")
    return y, last


def _is_step(x: Tensor) -> bool:
    """Whether x is of one step. Whole sequences, short ones too, keep their form, however few rows they have."""
    return x.ndim > 2 and x.shape[1] == 1


def norm_step(x: Tensor, weight: Tensor | None, divisor: float, eps: float) -> Tensor | None:
    """weight * x / sqrt(sum of x^2 / divisor + eps) along the last axis, of few numbers of one step (B, 1, ...)."""
    n = x.shape[-1]
    if not _is_step(x) or x.numel() > FEW_NUMBERS or not x.numel() or (weight is not None and weight.shape != (n,)):
        return None
    if not steps_alone(KERNEL, x, weight):
        return None
    y = torch.empty_like(x)
    KERNEL.bare("norm_step")(x.data_ptr(), address(weight), y.data_ptr(), x.numel() // n, n, divisor, eps)
    return y


def gated_mlp_step(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """`gated_mlp` of few rows (B, 1, K), whose shapes have been compared."""
    H, K = gate.shape
    rows = x.numel() // K if _is_step(x) else 0
    if not rows or rows > FEW_ROWS or H * K > FEW_WEIGHTS or not steps_alone(KERNEL, x, gate, up, down):
        return None
    y = torch.empty_like(x)
    KERNEL.bare("gated_mlp_step")(
        x.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        down.data_ptr(),
        y.data_ptr(),
        *(rows, K, H, torch.get_num_threads()),
    )
    return y


def squared_relu_step(x: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """relu(x W_up^T)^2 W_down^T of few rows (B, 1, K); up (H, K), down (K, H)."""
    H, K = up.shape
    rows = x.numel() // K if _is_step(x) else 0
    if not rows or rows > FEW_ROWS or H * K > FEW_WEIGHTS or not steps_alone(KERNEL, x, up, down):
        return None
    y = torch.empty_like(x)
    numbers = rows, K, H, torch.get_num_threads()
    KERNEL.bare("squared_relu_step")(x.data_ptr(), up.data_ptr(), down.data_ptr(), y.data_ptr(), *numbers)
    return y


def rotate_step(
    x: Tensor, length: Tensor, width: int, base: float, scaling: RopeScaling | None, interleaved: bool
) -> Tensor | None:
    """x (B, 1, H, K), its first `width` channels turned to the positions `length` (B,), see `rotary_table`."""
    if torch.compiler.is_compiling() or x.ndim != 4 or x.shape[1] != 1 or not x.numel():
        return None
    x = x.contiguous()
    if not steps_alone(KERNEL, x) or not counts(length, len(x)):
        return None
    B, _, H, K = x.shape
    frequencies, amplitude = turning(width, base, scaling)
    y = torch.empty_like(x)
    KERNEL.bare("rotate_step")(
        x.data_ptr(),
        length.data_ptr(),
        frequencies.data_ptr(),
        y.data_ptr(),
        *(B, H, K, len(frequencies), interleaved, amplitude),
    )
    return y


def attention_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor | None:
    """One query a row, (B, 1, H, K), against a cache with room for its key and value, which are written into it.

    Shapes have been compared. `length` is counted up.
    """
    q, k_new, v_new = q.contiguous(), k_new.contiguous(), v_new.contiguous()
    if k.requires_grad or v.requires_grad or not counts(length, len(q)):
        return None
    if not steps_alone(KERNEL, q, k_new, v_new, k, v, sinks):
        return None
    (B, _, H, K), (_, N, G, V) = q.shape, v.shape
    o = q.new_empty(B, 1, H, V)
    increment_version([k, v, length])
    KERNEL.bare("attention_step")(
        q.data_ptr(),
        k_new.data_ptr(),
        v_new.data_ptr(),
        address(sinks),
        k.data_ptr(),
        v.data_ptr(),
        length.data_ptr(),
        o.data_ptr(),
        *(B, N, G, H, K, V, torch.get_num_threads(), scale, softcap or 0.0),
    )
    log_form("attention", "compiled")
    return o


@functools.lru_cache(maxsize=64)
def turning(width: int, base: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Frequencies (width / 2,) in float64, and the factor on cosines and sines."""
    return rotary.frequencies(width, base, scaling, device=torch.device("cpu")), rotary.amplitude(scaling)


def _next(state: Tensor, in_place: bool) -> Tensor:
    """Where the next state goes. Autograd is told of memory that it may have kept for a backward pass."""
    if not in_place or state.requires_grad:
        return torch.empty_like(state)
    increment_version(state)
    return state


def counts(length: Tensor, n: int) -> bool:
    """Whether a kernel may count these lengths (n,) up where they lie."""
    return length.dtype is torch.int64 and length.is_cpu and length.is_contiguous() and length.shape == (n,)


def address(x: Tensor | None) -> int | None:
    """Where its numbers lie; a null pointer for None."""
    return None if x is None else x.data_ptr()
