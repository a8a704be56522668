"""The gated perceptron y = W_down (silu(W_gate x) * W_up x), which most feed-forward layers are (SwiGLU).

With a norm inside it is y = W_down (sigmoid(g) * norm(g * u)) for g = W_gate x and u = W_up x.

On a CPU a compiled kernel takes all three products at once, so that hidden activations stay in the caches: in float32,
and in bfloat16 where the CPU multiplies it in vectors (avx512_bf16).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import native
from zoo.ops._normed_product import EPS, normed_product
from zoo.ops._silu_product import silu_product
from zoo.ops.bridge import Operator
from zoo.ops.common import log_form
from zoo.ops.derivatives import constant_in_graphs
from zoo.ops.kernel import Call, Kernel, suffix
from zoo.ops.single_step import gated_mlp_step

LANES, ROWS = 16, 96  # of the kernel: what widths are padded to, and rows of a block
KERNEL = Kernel("gated_mlp", sizes={"WIDEST": LANES, "ROWS": ROWS}, dtypes=(torch.float32, torch.bfloat16))
FEW_ROWS = 128  # up to here packing the weights costs more than it saves

Packed = dict[tuple[Any, ...], tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]]
_packed: ContextVar[Packed | None] = ContextVar("packed", default=None)


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Within it weights do not change, so that kernels pack each once: for models that call one layer many times.

    Without effect where torch.compile traces it: a graph holds no such state, and its kernels pack at every call.
    """
    if torch.compiler.is_compiling():
        yield
        return
    token = _packed.set({})
    try:
        yield
    finally:
        _packed.reset(token)


def gated_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, along_time: bool = False, inner_norm: bool = False
) -> Tensor:
    """silu(x W_gate^T) * (x W_up^T), times W_down^T.

    Args:
        x: (..., K), or (B, K, D) with `along_time`.
        gate, up: (H, K).
        down: (K, H).
        along_time: mix the K steps of each channel instead of the channels of each step.
        inner_norm: `normed_product` in place of silu(x W_gate^T) * (x W_up^T).

    Returns:
        As x; under autocast in its dtype.
    """
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
    weights, width = (gate, up, down), x.shape[-2 if along_time else -1]
    fits = gate.shape == up.shape == (len(gate), width) and down.shape == (width, len(gate))
    if fits and not along_time and not inner_norm and (done := gated_mlp_step(x, *weights)) is not None:
        log_form("gated_mlp", "compiled")
        return done
    if (
        fits
        and why_not(x, *weights, along_time=along_time) is None
        and (autocast or all(w.dtype == x.dtype for w in weights))
    ):
        log_form("gated_mlp", "compiled")
        return (compiled_normed if inner_norm else compiled)(x, *weights, along_time)[0]
    log_form("gated_mlp", "plain")
    return _plain(x, gate, up, down, along_time, inner_norm)


def _plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, along_time: bool, inner_norm: bool) -> Tensor:
    h = x.transpose(-1, -2) if along_time else x
    product = normed_product if inner_norm else silu_product
    y = F.linear(product(F.linear(h, gate), F.linear(h, up)), down)
    return y.transpose(-1, -2) if along_time else y


def why_not(x: Tensor, *weights: Tensor, along_time: bool = False) -> str | None:
    """Why the compiled kernel does not take this call, None where it does."""
    if x.numel() // max(x.shape[-2 if along_time else -1], 1) <= FEW_ROWS:
        return "few rows: packing the weights would take longer than the products"
    refused = KERNEL.why_not(x, *weights)
    if refused is None and x.dtype == torch.bfloat16 and not _has_bfloat16():
        return "this CPU has no avx512_bf16, or has better (amx_bf16)"
    return refused


@constant_in_graphs  # not on the cached function itself: dynamo would trace that all the same
def _has_bfloat16() -> bool:
    return _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    if native.has_flag("amx_bf16"):  # oneDNN's products, in tiles, are several times as fast
        return False
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    KERNEL("gated_mlp_has_bfloat16", (), (found,))
    return bool(found.item())


CHUNK = 6  # blocks, the least whose weight gradients are summed before they go to memory


_kept = threading.local()


def _scratch(numbers: int) -> Tensor:
    """Room for `numbers` floats, the same again in later calls of this thread: fresh pages cost time."""
    if getattr(_kept, "room", None) is None or _kept.room.numel() < numbers:
        _kept.room = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return _kept.room


class _Sizes:
    """What the kernel asks for, in its units of one float or two bfloat16.

    Attributes:
        shape: (outer, inner, outer stride, row stride, column stride, K, H), the rows being outer * inner.
        columns, hidden: K and H, padded.
    """

    def __init__(self, x: Tensor, gate: Tensor, along_time: bool):
        width, n_rows = x.shape[-2:] if along_time else (x.shape[-1], x.numel() // x.shape[-1])
        outer = x.numel() // (width * n_rows)
        strides = (width * n_rows, 1, n_rows) if along_time else (0, width, 1)
        self.shape = outer, n_rows, *strides, width, len(gate)
        self.pair = 2 if x.dtype == torch.bfloat16 else 1
        self.columns, self.hidden = -(-width // LANES) * LANES, -(-len(gate) // (2 * LANES)) * 2 * LANES
        self.blocks = CHUNK * -(-torch.get_num_threads() // CHUNK)

    def packed(self, back: bool) -> tuple[int, int]:
        """Units of the packed (gate and up, down)."""
        units, by_hidden = -(-self.shape[5] // self.pair), self.hidden // self.pair * self.columns
        return (2 * by_hidden, units * self.hidden) if back else (2 * units * self.hidden, by_hidden)

    def saved(self) -> int:
        """Numbers that the backward pass reads again."""
        return self.rows() * 2 * self.hidden

    def rows(self) -> int:
        """Rows of all blocks."""
        outer, inner = self.shape[:2]
        return outer * -(-inner // ROWS) * ROWS

    def scratch(self) -> int:
        """Units of room for one chunk of the backward pass."""
        return self.blocks * ROWS // self.pair * (2 * self.columns + 3 * self.hidden)


def _pack(call: Call, x: Tensor, sizes: _Sizes, weights: tuple[Tensor, ...], back: bool) -> tuple[Tensor, Tensor]:
    """(gate and up, down) in the kernel's order; the same ones again within `constant_weights`."""
    known = _packed.get() if call is KERNEL else None
    key = () if known is None else (*((w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights), sizes.pair, back)
    if known is not None and key in known:
        return known[key][1]
    gate_up, down = (weights[0].new_empty(n, dtype=torch.float32) for n in sizes.packed(back))
    wide = [w.float().contiguous() for w in weights]
    call(f"gated_mlp_pack_{suffix(x)}", wide, (gate_up, down), *sizes.shape, back)
    if known is not None:
        known[key] = weights, (gate_up, down)  # the weights too: what is freed gives its address to others
    return gate_up, down


def _forward(call: Call, x, gate, up, down, along_time, keep) -> tuple[Tensor, Tensor | None]:
    """y, and where `keep` what the backward pass reads, in the kernel's order."""
    return _run(call, x, (gate, up, down), along_time, keep, False)[:2]


def _normed_forward(call: Call, x, gate, up, down, along_time, keep) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `_forward`, and the inverse root mean square of each row of a block in float32."""
    return _run(call, x, (gate, up, down), along_time, keep, True)


def _run(call: Call, x, weights, along_time, keep, inner_norm) -> tuple[Tensor, Tensor | None, Any]:
    sizes = _Sizes(x, weights[0], along_time)
    packed = _pack(call, x, sizes, weights, False)
    y, saved = torch.empty_like(x), x.new_empty(sizes.saved()) if keep else None
    inverse = x.new_empty(sizes.rows(), dtype=torch.float32) if inner_norm else None
    call(f"gated_mlp_forward_{suffix(x)}", (x, *packed), (y, saved, inverse), *sizes.shape, EPS)
    return y, saved, inverse


def _backward(call: Call, x, gate, up, down, along_time, saved, d_y) -> tuple[Tensor, ...]:
    return _normed_backward(call, x, gate, up, down, along_time, None, saved, None, d_y)


def _normed_backward(call: Call, x, gate, up, down, along_time, y, saved, inverse, d_y) -> tuple[Tensor, ...]:
    sizes = _Sizes(x, gate, along_time)
    packed = _pack(call, x, sizes, (gate, up, down), True)
    d_x, scratch = torch.empty_like(x), _scratch(sizes.scratch()) if call is KERNEL else None
    d_weights = [gate.new_empty(sizes.hidden, sizes.columns, dtype=torch.float32) for _ in range(3)]
    reads, writes = (x, d_y, saved, y, inverse, *packed), (d_x, *d_weights, scratch)
    call(f"gated_mlp_backward_{suffix(x)}", reads, writes, *sizes.shape, sizes.blocks)
    d_gate, d_up, d_down = (d[: gate.shape[0], : gate.shape[1]].to(gate.dtype) for d in d_weights)
    return d_x, d_gate, d_up, d_down.t()


def _plain_operator(inner_norm: bool) -> Callable[..., Tensor]:
    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, along_time: bool) -> Tensor:
        return _plain(x, gate.to(x.dtype), up.to(x.dtype), down.to(x.dtype), along_time, inner_norm)

    return plain


compiled = Operator(
    KERNEL,
    """gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, bool along_time, bool keep)
    -> (Tensor y, Tensor saved)""",
    _forward,
    _backward,
    gradients="x gate up down",
    plain=_plain_operator(False),
    strided="gate up down",
    scope=_packed,
)

compiled_normed = Operator(
    KERNEL,
    """normed_gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, bool along_time, bool keep)
    -> (Tensor y, Tensor saved, Tensor inverse)""",
    _normed_forward,
    _normed_backward,
    gradients="x gate up down",
    plain=_plain_operator(True),
    strided="gate up down",
    scope=_packed,
)
