"""Functions of single numbers that Triton's core lacks, or has with too large an error, for the kernels beside it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), whose exponential cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """By exp(-2 |x|): the error is that of numbers near 1, for small x too."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, y, -y)


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log1p(exp(-|x|)), where log1p(u) is log(1 + u) times what rounding 1 + u did to u."""
    u = tl.exp(-tl.abs(x))
    y = 1.0 + u
    rounded = tl.where(y == 1.0, 1.0, y - 1.0)
    return tl.minimum(x, 0.0) - tl.where(y == 1.0, u, tl.log(y) * (u / rounded))
