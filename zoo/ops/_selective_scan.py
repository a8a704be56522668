"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.2 and algorithm 2).

A bank of N decaying states for each channel, whose step size, input and read-out vectors depend on the input. The
states of all steps, (B, T, D, N), are never stored at once: every form but the step-by-step one keeps those at the
boundaries of chunks, and makes the others again in the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common, sizes
from zoo.ops._scan import adjoint_chunks, scan_chunks
from zoo.ops.adapters import mamba_ssm
from zoo.ops.bridge import Operator
from zoo.ops.common import blank
from zoo.ops.derivatives import gradients_of, guarded, once
from zoo.ops.kernel import Call, Kernel, suffix
from zoo.ops.triton_kernel import TritonKernel
from zoo.pieces import Pieces

CHUNK, INNER_CHUNK = sizes.chunk("selective_scan", "chunked"), 8
KERNEL_CHUNK, KERNEL_GROUP = 32, 128  # those of the kernel: steps between kept states, channels that share a sum
KERNEL = Kernel(
    "selective_scan", sizes={"CHUNK": KERNEL_CHUNK, "GROUP": KERNEL_GROUP}, dtypes=(torch.float32, torch.float64)
)
TRITON = TritonKernel("selective_scan")
FEW_STEPS = 1  # decoding
LEGEND = (
    "u, delta, z (B, T, D); A (D, N); B, C (B, T, N); D, delta_bias (D,); state (B, D, N); lengths (B,) whole "
    "numbers; resets (B, T) bool."
)


@common.without_autocast
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t^T ; y_t = (h_t C_t + D * u_t) * silu(z_t), for every channel.

    Args:
        u: (B, T, D), the inputs.
        delta: (B, T, D); dt = delta + delta_bias, or softplus of that where `delta_softplus`.
        A: (D, N), rates, negative where states decay.
        B, C: (B, T, N), shared by all channels.
        D: (D,), weight of the input in the output; none by default.
        z: (B, T, D), gate; none by default.
        delta_bias: (D,), none by default.
        state: h_0 (B, D, N), float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", "compiled" (C++, CPU), "triton" (float32, GPU),
            or "mamba_ssm" (CUDA, from rest, without documents).
    Returns:
        y (B, T, D) in u's dtype, h_T (B, D, N).
    """
    if u.ndim != 3 or A.ndim != 2 or 0 in u.shape or 0 in A.shape:
        raise UsageError(f"selective_scan: u {tuple(u.shape)}, A {tuple(A.shape)}. Expected shapes: {LEGEND}")
    (batch, n_steps, width), n_states = u.shape, A.shape[1]
    shapes = {"A": (width, n_states), "B": (batch, n_steps, n_states), "C": (batch, n_steps, n_states)}
    shapes |= {"delta": tuple(u.shape), "z": tuple(u.shape), "D": (width,), "delta_bias": (width,)}
    given = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, tensor in given.items():
        common.check("selective_scan", LEGEND, name, tensor, u, shapes[name])
    common.check("selective_scan", LEGEND, "state", state, u, (batch, width, n_states))
    lengths = common.check_packing("selective_scan", LEGEND, u, lengths, resets)
    dtype = common.state_dtype(u, delta, A, B, C)
    common.check_dtypes("selective_scan", state, dtype, u=u, **given)
    if pieces is not None:
        how: Any = {"delta_softplus": delta_softplus, "resets": resets, "chunk_size": chunk_size, "backend": backend}
        run = functools.partial(selective_scan, delta=delta, A=A, B=B, C=C, z=z, delta_bias=delta_bias, **how)
        dt = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
        total = (F.softplus(dt) if delta_softplus else dt).sum(1)[..., None] * A.to(dtype)
        return _over_pieces(pieces, run, u, D, state, total, resets)
    chunk = common.chunk_length(chunk_size, CHUNK, n_steps)
    inputs: dict[str, Any] = {
        name: None if tensor is None else tensor.to(dtype) for name, tensor in {"u": u, **given}.items()
    }
    offers = {
        "mamba_ssm": lambda: mamba_ssm.why_not_scan(u, state, resets),
        **compiled_selective_scan.offers(*inputs.values()),
    }
    form = common.choose_form("selective_scan", backend, n_steps, FEW_STEPS, offers, decode="compiled")
    if lengths is not None:  # a padded step has dt = 0: it leaves the state as it is
        padding = ~common.valid_steps(lengths, n_steps)
        inputs |= {name: None if inputs[name] is None else blank(inputs[name], padding) for name in "uBCz"}
        inputs["delta"] = inputs["delta"].masked_fill(padding[..., None], -torch.inf if delta_softplus else 0.0)
        if delta_bias is not None and not delta_softplus:
            inputs["delta"] = inputs["delta"] - inputs["delta_bias"] * padding[..., None]
    if form == "mamba_ssm":
        wide = ("A", "D", "delta_bias")
        taken: dict[str, Any] = {n: x if x is None or n in wide else x.to(u.dtype) for n, x in inputs.items()}
        rest = u.new_zeros(batch, width, n_states, dtype=dtype)
        y, state = guarded(
            functools.partial(_plain, state=rest, resets=resets, softplus=delta_softplus),
            mamba_ssm.selective_scan(**taken, delta_softplus=delta_softplus),
            tuple(inputs.values()),
        )
        return (y if lengths is None else blank(y, padding)).to(u.dtype), state
    state = u.new_zeros(batch, width, n_states, dtype=dtype) if state is None else state
    if form in compiled_selective_scan.forms:
        y, state, _ = compiled_selective_scan.forms[form](*inputs.values(), state, resets, delta_softplus)
    else:
        y, state = _plain(**inputs, state=state, resets=resets, softplus=delta_softplus, form=form, chunk=chunk)
    return (y if lengths is None else blank(y, padding)).to(u.dtype), state


def _over_pieces(pieces, run, u, D, state, log_total, resets) -> tuple[Tensor, Tensor]:
    """From rest, and beside that what the state before the piece adds: the outputs are linear in it too."""
    if pieces.is_first:
        y, last = run(u, D=D, state=state)
        return pieces.send(y, last), last
    y, last = run(u, D=D)
    (before,), total = pieces.receive(torch.zeros_like(last)), log_total.exp()
    last = last + (total if resets is None else blank(total, resets.any(1))) * before
    y = pieces.send(y, last)
    return y + run(torch.zeros_like(u), state=before)[0], last


def _plain(u, delta, A, B, C, D, z, delta_bias, state, resets, softplus: bool, form: str = "chunked", chunk=CHUNK):
    """What comes before and after the recurrence, in plain PyTorch."""
    dt = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(dt) if softplus else dt
    recurrence = (dt, dt * u, A, B, C, state, resets)
    y, state, *_ = _reference(*recurrence) if form == "reference" else _Chunks.apply(*recurrence, chunk)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z), state


def _reference(dt, x, A, B, C, state, resets) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = blank(state, resets[:, t])
        state = torch.exp(dt[:, t, :, None] * A) * state + x[:, t, :, None] * B[:, t, None]
        outputs.append((state @ C[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), state


class _Chunks(torch.autograd.Function):
    """One chunk after the other; inside each a scan over (B, C, D, N). The states before each chunk are kept.

    With g the gradient of h and q = g_t a_t h_{t-1}, all of one chunk at a time: d_C = sum_d d_y h ; d_B = sum_d g x ;
    d_x = g B ; d_dt = sum_n q A ; d_A = sum_t q dt.
    """

    @staticmethod
    def forward(dt, x, A, B, C, state, resets, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)  # whole buffers: small ones, kept between large ones that come and go, pin memory
        starts = x.new_empty(x.shape[0], -(-x.shape[1] // chunk), *A.shape)
        for index in range(starts.shape[1]):
            steps = slice(index * chunk, (index + 1) * chunk)
            starts[:, index] = state
            _, h = _Chunks.states(dt, x, A, B, state, resets, steps)
            y[:, steps] = (h @ C[:, steps, :, None]).squeeze(-1)
            state = common.owned(h[:, -1])
        return y, state, starts

    @staticmethod
    def states(dt, x, A, B, state, resets, steps: slice) -> tuple[Tensor, Tensor]:
        """Decays and states of one chunk, (B, C, D, N)."""
        a = torch.exp(dt[:, steps, :, None] * A)
        a = a if resets is None else blank(a, resets[:, steps])
        return a, scan_chunks(a, x[:, steps, :, None] * B[:, steps, None], state, INNER_CHUNK)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.chunk = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    @common.without_autocast
    @once(lambda ctx, *d: (*gradients_of(_reference, ctx.saved_tensors[:7], d[:2]), None))
    def backward(ctx, d_y, d_state, _):
        dt, x, A, B, C, _, resets, starts = ctx.saved_tensors
        d_dt, d_x, d_A, d_B, d_C = (torch.zeros_like(i) for i in (dt, x, A, B, C))
        for index in reversed(range(starts.shape[1])):
            steps = slice(index * ctx.chunk, (index + 1) * ctx.chunk)
            a, h = _Chunks.states(dt, x, A, B, starts[:, index], resets, steps)
            g = adjoint_chunks(a, d_y[:, steps, :, None] * C[:, steps, None], d_state, INNER_CHUNK)
            d_C[:, steps] = (d_y[:, steps, None] @ h).squeeze(2)
            d_B[:, steps] = (x[:, steps, None] @ g).squeeze(2)
            d_x[:, steps] = (g @ B[:, steps, :, None]).squeeze(-1)
            decayed = a * g
            q = decayed * torch.cat([starts[:, index, None], h[:, :-1]], 1)
            d_dt[:, steps] = (q * A).sum(-1)
            d_A += (q * dt[:, steps, :, None]).sum((0, 1))
            d_state = decayed[:, 0]
        return d_dt, d_x, d_A, d_B, d_C, d_state, None, None


def _forward(
    call: Call, u, delta, A, B, C, D, z, delta_bias, state, resets, softplus, keep
) -> tuple[Tensor | None, ...]:
    """y, the last state, and, where `keep`, the states before every KERNEL_CHUNK-th step."""
    (batch, n_steps, width), n_states = u.shape, A.shape[1]
    y, last = torch.empty_like(u), torch.empty_like(state)
    kept = u.new_empty(batch, -(-n_steps // KERNEL_CHUNK), n_states, width) if keep else None
    reads = (u, delta, A, B, C, D, z, delta_bias, state, resets)
    call(f"selective_scan_forward_{suffix(u)}", reads, (y, last, kept), *u.shape, n_states, softplus)
    return y, last, kept


def _backward(
    call: Call, u, delta, A, B, C, D, z, delta_bias, state, resets, softplus, kept, d_y, d_last
) -> tuple[Tensor | None, ...]:
    (batch, n_steps, width), n_states = u.shape, A.shape[1]
    d_u, d_delta, d_state = (torch.empty_like(x) for x in (u, delta, state))
    d_z = None if z is None else torch.empty_like(z)
    d_B, d_C = u.new_empty(2, -(-width // KERNEL_GROUP), batch, n_steps, n_states)
    d_A = u.new_zeros(batch, width, n_states, dtype=torch.float64)
    d_D, d_bias = u.new_zeros(2, batch, width, dtype=torch.float64)
    reads = (u, delta, A, B, C, D, z, delta_bias, state, resets, kept, d_y, d_last)
    writes = (d_u, d_delta, d_z, d_state, d_B, d_C, d_A, d_D, d_bias)
    call(f"selective_scan_backward_{suffix(u)}", reads, writes, *u.shape, n_states, softplus)
    d_A, d_D, d_bias, d_B, d_C = (x.sum(0).to(u.dtype) for x in (d_A, d_D, d_bias, d_B, d_C))
    return d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_state


compiled_selective_scan = Operator(
    KERNEL,
    """selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,
    Tensor state, Tensor? resets, bool softplus, bool keep) -> (Tensor y, Tensor last, Tensor kept)""",
    _forward,
    _backward,
    gradients="u delta A B C D z delta_bias state",
    plain=_plain,
    triton=TRITON,
)
