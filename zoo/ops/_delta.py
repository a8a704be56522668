"""The compiled form of the delta rule and of DPLR: `kernels/delta.cpp` as an operator with a backward pass.

One kernel serves both, since they differ only in what is read and written: the delta rule reads the state for k and
writes back the difference to what it should have read; DPLR reads it for a, writes that for b, and v for k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops import native
from zoo.ops.common import Heads, blank
from zoo.ops.derivatives import gradients_of, once

CHUNK, WIDE_CHUNK = 32, 64  # for K up to 64, and above: steps from one state kept for the backward pass to the next
LANES = 16  # what the sizes of kept states are multiples of


def compiled_delta(
    heads: Heads, scale: float, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, T, G, R, V) and S_T (B, G, R, K, V): of DPLR where a, b (B, T, G, R, K) are given, else of the delta rule.

    All of a chunk stays in the cache, and only one state a chunk is kept for the gradients.
    """
    q, k, v, g, beta, state, resets = heads
    if a is not None:  # the kernel has DPLR with one decay a channel
        g = a.new_zeros(1).expand(a.shape) if g is None else g.expand(a.shape)
    elif g is not None and g.shape[-1] == 1:
        g = g.squeeze(-1)
    steps = [None if x is None else x.flatten(2, 3) for x in (v, beta, a, b, g)]
    inputs = q, k, *steps, state.flatten(1, 2)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, last, _ = _forward(*inputs, resets, scale, keep)
    return o.unflatten(2, v.shape[2:4]), last.unflatten(1, v.shape[2:4])


@torch.library.custom_op("zoo::delta", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, S_T and, where they are to be kept, the states before each chunk. Heads lie side by side, as in the ops."""
    inputs = _contiguous(q, k, v, beta, a, b, g, state, resets)
    o, last, states = _outputs(q, v, state, keep)
    native.load("delta").delta_forward(*inputs, o, last, states if keep else None, _sizes(q, v, g, 1), scale)
    return o, last, states


@_forward.register_fake
def _(q, k, v, beta, a, b, g, state, resets, scale, keep):
    return _outputs(q, v, state, keep)


def _outputs(q: Tensor, v: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, V = v.shape
    kept = (B, H, -(-T // _chunk(q)), -(-q.shape[3] // LANES) * LANES, -(-V // LANES) * LANES)
    return v.new_empty(v.shape), state.new_empty(state.shape), v.new_empty(kept if keep else (0,))


@torch.library.custom_op("zoo::delta_backward", mutates_args=(), device_types="cpu")
def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor | None,
    resets: Tensor | None,
    states: Tensor,
    d_o: Tensor,
    d_last: Tensor,
    scale: float,
) -> list[Tensor]:
    """The gradients of q, k, v, beta, a, b, g and the state, empty for those that are not there."""
    B, _, G, _ = q.shape
    parts = _parts(B * G, v.shape[2] // G)
    inputs = _contiguous(q, k, v, beta, a, b, g, resets, states, d_o, d_last)
    out = _like_inputs(q, k, v, beta, a, b, g, d_last)
    d_q, d_k = (x.new_empty(*x.shape[:3], parts, x.shape[3]) if parts > 1 else x for x in out[:2])
    optional = [out[i] if x is not None else None for i, x in enumerate((v, beta, a, b, g, d_last), 2)]
    native.load("delta").delta_backward(*inputs, d_q, d_k, *optional, _sizes(q, v, g, parts), scale)
    if parts > 1:
        torch.sum(d_q, 3, out=out[0])
        torch.sum(d_k, 3, out=out[1])
    return out


@_gradients.register_fake
def _(q, k, v, beta, a, b, g, resets, states, d_o, d_last, scale):
    return _like_inputs(q, k, v, beta, a, b, g, d_last)


def _like_inputs(*inputs: Tensor | None) -> list[Tensor]:
    like = next(x for x in inputs if x is not None)
    return [like.new_empty(0 if x is None else x.shape) for x in inputs]


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _plain(q, k, v, beta, a, b, g, state, resets, scale) -> tuple[Tensor, Tensor]:
    """The operator `zoo::delta` in plain PyTorch, one step at a time."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    decays = None if g is None else (g if g.ndim == 4 else g.unsqueeze(-1)).exp().unsqueeze(-1)  # (B, T, H, K or 1, 1)
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        q_t, k_t, v_t = (x[:, t].unsqueeze(-2) for x in (q, k, v))  # (B, H, 1, K or V)
        read = None if a is None else a[:, t].unsqueeze(-2) @ state
        state = state if decays is None else decays[:, t] * state
        if read is None:
            state = state + k_t.mT * (beta[:, t, ..., None] * (v_t - k_t @ state))
        else:
            state = state + b[:, t].unsqueeze(-1) * read + k_t.mT * v_t
        outputs.append(scale * (q_t @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


@once(lambda ctx, *d: (*gradients_of(_plain, (*ctx.saved_tensors[:9], ctx.scale), d[:2]), None))
def _backward(ctx, d_o, d_last, _):
    *saved, _, resets, states = ctx.saved_tensors
    q, v = saved[0], saved[2]
    d_o = v.new_zeros(v.shape) if d_o is None else d_o
    d_last = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3]) if d_last is None else d_last
    gradients = _gradients(*saved, resets, states, d_o, d_last, ctx.scale)
    given = (*saved[:7], d_last)
    return *(d if x is not None else None for d, x in zip(gradients, given, strict=True)), None, None, None


_forward.register_autograd(_backward, setup_context=_setup)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _parts(groups: int, heads: int) -> int:
    """Into how many parts the heads of a group are cut, so that all threads have some: a divisor of `heads`."""
    wanted = -(-torch.get_num_threads() // groups)
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n >= wanted or n == heads))


def _chunk(q: Tensor) -> int:
    return CHUNK if q.shape[3] <= 64 else WIDE_CHUNK


def _sizes(q: Tensor, v: Tensor, g: Tensor | None, parts: int) -> Tensor:
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    return torch.tensor([B, T, G, H, K, V, _chunk(q), parts, g is not None and g.ndim == 4], device="cpu")
