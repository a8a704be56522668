"""The recurrence of driven oscillators, each of which has a speed and a place.

The core of LinOSS (Rusch and Rus 2025, eq. 3 to 5) and D-LinOSS (Boyer et al. 2025). As in `scan`, only products of the
given coefficients and sums are formed. A scan of complex numbers would not do: where an oscillator stands still, or is
critically damped, or where step sizes differ, its two numbers have no common eigenvectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common, sizes
from zoo.ops.bridge import Operator
from zoo.ops.common import blank, widest
from zoo.ops.kernel import Call, Kernel, suffix
from zoo.ops.triton_kernel import TritonKernel

DTYPES = (torch.float32, torch.float64)
KERNEL, TRITON = Kernel("oscillate", dtypes=DTYPES), TritonKernel("oscillate", dtypes=DTYPES)
CHUNK = sizes.chunk("oscillate", "chunked")
FEW_STEPS = 2  # decoding
LEGEND = (
    "b (B, T, ..., P); p, q, r (P) or (B, T, P); state (B, 2, ..., P); lengths (B,) whole numbers; resets (B, T) bool."
)
Pair = tuple[Tensor, ...]
"""Speeds z and places y."""
Matrix = tuple[Tensor, ...]
"""What takes z to z, y to z, z to y and y to y."""


@common.without_autocast
def oscillate(
    b: Tensor,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """z_t = p_t (z_{t-1} + b_t) - q_t y_{t-1} ;  y_t = y_{t-1} + r_t z_t, elementwise.

    Args:
        b: (B, T, ..., P), what is added to the speeds.
        p, q, r: (B, T, P), or (P), the same at all steps of all rows; shared by all axes of b in between.
        state: (B, 2, ..., P), z_0 and y_0, float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", "compiled" (C++, on a CPU) or "triton" (on a GPU).
    Returns:
        all y (B, T, ..., P) in b's dtype, the last z and y (B, 2, ..., P).
    """
    if b.ndim < 3 or 0 in b.shape:
        raise UsageError(f"oscillate: b has shape {tuple(b.shape)}. Expected shapes: {LEGEND}")
    n_steps, n_states = b.shape[1], b.shape[-1]
    shapes = ((n_states,),) if p.ndim == 1 else ((*b.shape[:2], n_states),)
    for name, x in {"p": p, "q": q, "r": r}.items():
        common.check("oscillate", LEGEND, name, x, b, *shapes)
    common.check("oscillate", LEGEND, "state", state, b, (b.shape[0], 2, *b.shape[2:]))
    lengths = common.check_packing("oscillate", LEGEND, b, lengths, resets)
    dtype = common.state_dtype(b, p, q, r)
    common.check_dtypes("oscillate", state, dtype, b=b, p=p, q=q, r=r)
    chunk = common.chunk_length(chunk_size, CHUNK, n_steps)
    given = [x.to(dtype) for x in (b, p, q, r)]
    offers = compiled_oscillate.offers(given[0])
    form = common.choose_form("oscillate", backend, n_steps, FEW_STEPS, offers, decode="compiled")

    state = given[0].new_zeros(b.shape[0], 2, *b.shape[2:]) if state is None else state
    if form in compiled_oscillate.forms:
        y, state, _ = compiled_oscillate.forms[form](*given, state, resets, lengths)
    else:
        chunk = n_steps if form == "reference" else chunk
        y, state = _plain(given[0], given[1], given[2], given[3], state, resets, lengths, chunk)
    return y.to(b.dtype), state


def _plain(
    b: Tensor,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """All y and the last state, in plain PyTorch; in one chunk, one step at a time."""
    shape = (*b.shape[:2], *[1] * (b.ndim - 3), b.shape[-1])
    if b.shape[1] > chunk:  # 1 - r q rounds, which adds up over thousands of chunks
        p, q, r = (x.to(widest(b.device)) for x in (p, q, r))
    matrix = tuple(x.expand(*b.shape[:2], -1).reshape(shape) for x in (p, -q, r * p, 1 - r * q))
    drive: Pair = ((matrix[0] * b).to(b.dtype), (matrix[2] * b).to(b.dtype))
    if resets is not None:
        matrix = tuple(blank(x, resets) for x in matrix)
    padding = None if lengths is None else ~common.valid_steps(lengths, b.shape[1])
    if padding is not None:
        drive = tuple(blank(x, padding) for x in drive)
        stays = padding.reshape(*padding.shape, *[1] * (b.ndim - 2))
        matrix = tuple(x.masked_fill(stays, value) for x, value in zip(matrix, (1.0, 0.0, 0.0, 1.0), strict=True))
    z, y = oscillate_chunks(matrix, drive, (state[:, 0], state[:, 1]), chunk)
    return y if padding is None else blank(y, padding), torch.stack([z[:, -1], y[:, -1]], 1)


def _times(m: Matrix, x: Pair) -> Pair:
    return m[0] * x[0] + m[1] * x[1], m[2] * x[0] + m[3] * x[1]


def _at(tensors: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    return tuple(x[:, :, i] for x in tensors)


def _advance(m: Matrix, drive: Pair, x: Pair) -> Pair:
    """The steps of (B, n, C, ...) one after the other, all chunks at once, each from its state (B, n, ...)."""
    steps = []
    for i in range(drive[0].shape[2]):
        z, y = _times(_at(m, i), x)
        x = z + drive[0][:, :, i], y + drive[1][:, :, i]
        steps.append(x)
    return torch.stack([z for z, _ in steps], 2), torch.stack([y for _, y in steps], 2)


def oscillate_chunks(m: Matrix, drive: Pair, state: Pair, chunk: int) -> Pair:
    """All z and y (B, T, ...) in 2 * chunk steps that each take one step of all chunks, as `scan_chunks` does.

    Args:
        m: of every step, (B, T, ..., P), its axes in between those of `drive` or 1; in float64 where there is one.
        drive: what is added after it, (B, T, ..., P).
        state: (B, ..., P).
        chunk: steps a chunk.
    """
    n_steps = drive[0].shape[1]
    if n_steps <= chunk:
        one = [tuple(x.unsqueeze(1) for x in each) for each in (m, drive, state)]
        return tuple(x.squeeze(1) for x in _advance(*one))
    missing = -n_steps % chunk

    def cut(x: Tensor) -> Tensor:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x
        return x.unflatten(1, (-1, chunk))

    m, drive = tuple(map(cut, m)), tuple(map(cut, drive))
    wide, dtype = m[0].dtype, state[0].dtype
    whole, inputs = ([x[:, :-1].to(wide) for x in each] for each in (m, drive))
    total, after = _at(tuple(whole), 0), _at(tuple(inputs), 0)
    for i in range(1, chunk):
        now = _at(tuple(whole), i)
        left, right = _times(now, (total[0], total[2])), _times(now, (total[1], total[3]))
        total = (left[0], right[0], left[1], right[1])
        z, y = _times(now, after)
        after = (z + inputs[0][:, :, i], y + inputs[1][:, :, i])
    first = tuple(x.to(wide) for x in state)
    between = oscillate_chunks(total, after, first, chunk)
    starts = [torch.cat([x[:, None], rest], 1).to(dtype) for x, rest in zip(first, between, strict=True)]
    z, y = _advance(tuple(x.to(dtype) for x in m), drive, (starts[0], starts[1]))
    return z.flatten(1, 2)[:, :n_steps], y.flatten(1, 2)[:, :n_steps]


def _forward(
    call: Call,
    b: Tensor,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    y, last = torch.empty_like(b), torch.empty_like(state)
    z = torch.empty_like(b) if keep else None
    call(f"oscillate_forward_{suffix(b)}", (b, p, q, r, state, resets, lengths), (y, last, z), *_sizes(b, p))
    return y, last, z


def _backward(
    call: Call,
    b: Tensor,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    state: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    z: Tensor,
    d_y: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, ...]:
    shape = (b.shape[0], p.shape[0]) if p.ndim == 1 else p.shape  # of each row, where they are the same in all
    coefficients = [b.new_empty(shape) for _ in range(3)]
    d_b, d_state = torch.empty_like(b), torch.empty_like(state)
    reads = (b, p, q, r, state, resets, lengths, y, z, d_y, d_last)
    call(f"oscillate_backward_{suffix(b)}", reads, (d_b, *coefficients, d_state), *_sizes(b, p))
    d_p, d_q, d_r = (d.sum(0) for d in coefficients) if p.ndim == 1 else coefficients
    return d_b, d_p, d_q, d_r, d_state


compiled_oscillate = Operator(  # every block of oscillators runs through time on its own
    KERNEL,
    "oscillate(Tensor b, Tensor p, Tensor q, Tensor r, Tensor state, Tensor? resets, Tensor? lengths, bool keep)"
    " -> (Tensor y, Tensor last, Tensor z)",
    _forward,
    _backward,
    gradients="b p q r state",
    plain=_plain,
    triton=TRITON,
)


def _sizes(b: Tensor, p: Tensor) -> tuple[int, ...]:
    """B, T, how many share coefficients, P, and whether those differ from step to step."""
    return b.shape[0], b.shape[1], math.prod(b.shape[2:-1]), b.shape[-1], int(p.ndim > 1)
