"""The matrix LSTM: C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, h_t = C_t^T q_t / |n_t^T q_t|.

Beck et al., xLSTM: Extended Long Short-Term Memory (2024, arXiv 2405.04517), eq. 19 to 27, and, for the chunked form,
Tiled Flash Linear Attention (2025, arXiv 2503.14376), section 3. Gates are exponentials, so the state is kept as
C exp(-m), n exp(-m) with m the running maximum of the log gates: m_t = max(log f_t + m_{t-1}, log i_t), m_0 = 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import common, sizes
from zoo.ops.adapters import mlstm_kernels
from zoo.ops.bridge import Operator
from zoo.ops.common import Heads, blank, from_chunks, to_chunks
from zoo.ops.derivatives import gradients_of, once
from zoo.ops.kernel import Call, Kernel
from zoo.ops.triton_kernel import TritonKernel
from zoo.pieces import Pieces

KERNEL_CHUNK = 64  # of the compiled forms
KERNEL = Kernel("mlstm", sizes={"C": KERNEL_CHUNK})
TRITON = TritonKernel("mlstm", dtypes=(torch.float32, torch.bfloat16))
FEW_STEPS = 8  # up to here the step form is the faster one
EPS = 1e-6
SHUT = -1e4  # of a log gate that is fully shut: its exponential is zero beside any other, and sums of it stay exact
NEVER = -1e30  # a log gate of nothing at all, below that of any step
LEGEND = (
    "q, k (B, T, G, K) with G dividing H; v (B, T, H, V); log_i, log_f (B, T, H); "
    "state (C (B, H, K, V), n (B, H, K), m (B, H)); lengths (B,) whole numbers; resets (B, T) bool."
)


class MLSTMState(NamedTuple):
    """Memory and normaliser, both times exp(-m); zeros at rest, as published. Always finite."""

    C: Tensor  # (B, H, K, V)
    n: Tensor  # (B, H, K)
    m: Tensor  # (B, H)


class Gates(NamedTuple):
    """Log gates in the arithmetic's dtype, heads cut into (G, R). Padded steps: log_i = -inf, log_f = 0."""

    log_i: Tensor  # (B, T, G, R)
    log_f: Tensor  # (B, T, G, R)
    n: Tensor  # (B, G, R, K)
    m: Tensor  # (B, G, R)


@common.without_autocast
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    state: MLSTMState | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    scale: float | None = None,
    eps: float = EPS,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """C_t = f_t C_{t-1} + i_t k_t v_t^T ; n_t = f_t n_{t-1} + i_t k_t ; h_t = C_t^T q_t / max(|n_t^T q_t|, 1).

    q counts times `scale`. In terms of the state, which is C and n times exp(-m), the divisor is max(|n_t^T q_t|,
    exp(-m_t)) + eps: but for eps the outputs do not depend on m.

    Args:
        q, k: (B, T, G, K), G dividing H; consecutive H / G heads share a group.
        v: (B, T, H, V).
        log_i: (B, T, H), logarithm of the input gate: its preactivation. Below `SHUT`, -inf too, it counts as that.
        log_f: (B, T, H), logarithm of the forget gate: logsigmoid of its preactivation, or that itself; the same.
        state: (C, n, m), float32 (float64 for float64 inputs); None for zeros. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; the state is forgotten before a step where it is true.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece; `state` is then
            that before the first one.
        scale: K ** -0.5 by default.
        eps: added to the denominator.
        chunk_size: steps a chunk of the chunked form, rounded up to a power of two.
        backend: "auto", "reference" (one step at a time), "chunked", "compiled" (float32 on the CPU) or "triton" (on a
            GPU, in float32; bfloat16 q, k and v are multiplied as such); "mlstm_kernels" (on a GPU, without gradients).
    Returns:
        h (B, T, H, V) in v's dtype, the state after the last step.
    """
    if pieces is not None:
        how: Any = {"resets": resets, "scale": scale, "eps": eps, "chunk_size": chunk_size, "backend": backend}
        run = lambda v, state: mlstm(q, k, v, log_i, log_f, state, **how)  # noqa: E731
        return _over_pieces(pieces, run, q, v, log_f, state, resets)
    C, n, m = (None, None, None) if state is None else state
    heads = common.prepare_heads("mlstm", q, k, v, None, C, lengths, resets)
    gates = _gates(heads, log_i, log_f, n, m, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunk = common.chunk_length(chunk_size, sizes.chunk("mlstm", "chunked", q.shape[-1]), v.shape[1])
    given = q, k, v, log_i, log_f, C, n, m
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    library = lambda: mlstm_kernels.why_not(v, heads, chosen=backend == "mlstm_kernels", learns=learns)  # noqa: E731
    offers = {"mlstm_kernels": library, **_mlstm.offers(heads.v)}
    form = common.choose_form("mlstm", backend, v.shape[1], FEW_STEPS, offers, decode="compiled")
    if form == "mlstm_kernels":
        h, last = mlstm_kernels.mlstm(heads, *gates, scale, eps, v.dtype)
    elif form in _mlstm.forms:
        if form == "triton" and {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}:
            heads = heads._replace(**{name: getattr(heads, name).bfloat16() for name in "qkv"})
        h, last = _compiled(_mlstm.forms[form], heads, gates, scale, eps)
    elif form == "reference":
        h, last = _reference(heads, gates, scale, eps)
    else:
        h, last = _chunked(heads, gates, scale, eps, chunk)
    return h.flatten(2, 3).to(v.dtype), MLSTMState(*(leaf.flatten(1, 2) for leaf in last))


def _over_pieces(pieces, run, q, v, log_f, state, resets) -> tuple[Tensor, MLSTMState]:
    """Twice: once from rest, for the state that a piece adds, and once from the state before it, for its outputs."""
    (B, _, H, V), K, dtype = v.shape, q.shape[-1], common.state_dtype(q, v)
    rest = v.new_zeros(B, H, K, V, dtype=dtype), v.new_zeros(B, H, K, dtype=dtype), v.new_zeros(B, H, dtype=dtype)
    before = MLSTMState(*rest) if state is None else state
    if pieces.is_first:
        h, last = run(v, before)
        return pieces.send(h, *last), last
    added = run(v, MLSTMState(rest[0], rest[1], rest[2] + NEVER))[1]
    before = MLSTMState(*pieces.receive(*before))
    kept = log_f.to(dtype).clamp(min=SHUT).sum(1)
    old = kept + before.m
    if resets is not None:
        old = old.masked_fill(resets.any(1)[:, None], NEVER)
    m = torch.maximum(old, added.m)
    new, old = (added.m - m).exp(), (old - m).exp()
    C = old[..., None, None] * before.C + new[..., None, None] * added.C
    last = MLSTMState(C, old[..., None] * before.n + new[..., None] * added.n, m)
    return run(pieces.send(v, *last), before)[0], last


def _gates(
    heads: Heads, log_i: Tensor, log_f: Tensor, n: Tensor | None, m: Tensor | None, lengths: Tensor | None
) -> Gates:
    """Check gates, n and m, and bring them into the form of the heads."""
    (B, T, G, R, _), K, dtype = heads.v.shape, heads.k.shape[-1], heads.v.dtype
    for name, gate in (("log_i", log_i), ("log_f", log_f)):
        common.check("mlstm", LEGEND, name, gate, heads.v, (B, T, G * R))
    common.check("mlstm", LEGEND, "state's n", n, heads.v, (B, G * R, K))
    common.check("mlstm", LEGEND, "state's m", m, heads.v, (B, G * R))
    common.check_dtypes("mlstm", n, dtype, log_i=log_i, log_f=log_f)
    common.check_dtypes("mlstm", m, dtype)
    log_i, log_f = log_i.to(dtype).clamp(min=SHUT), log_f.to(dtype).clamp(min=SHUT)
    if lengths is not None:
        padding = ~common.valid_steps(lengths, T)
        log_i, log_f = log_i.masked_fill(padding[..., None], -torch.inf), blank(log_f, padding)
    n = heads.v.new_zeros(B, G * R, K) if n is None else n
    m = heads.v.new_zeros(B, G * R) if m is None else m
    log_i, log_f = (x.unflatten(-1, (G, R)) for x in (log_i, log_f))
    return Gates(log_i, log_f, n.unflatten(1, (G, R)), m.unflatten(1, (G, R)))


def _reference(heads: Heads, gates: Gates, scale: float, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The definition, one step at a time. Row and denominator are times exp(min(m, 0)), so that nothing overflows."""
    q, k, v, resets = heads.q, heads.k, heads.v, heads.resets
    C, n, m = heads.state, gates.n, gates.m
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None:
            C, n, m = (blank(x, resets[:, t]) for x in (C, n, m))
        log_i, kept = gates.log_i[:, t], gates.log_f[:, t] + m
        m = torch.maximum(kept, log_i)
        f, i = (kept - m).exp()[..., None], (log_i - m).exp()[..., None]
        k_t, q_t = k[:, t, :, None], scale * q[:, t, :, None]  # (B, G, 1, K) beside n (B, G, R, K)
        C = f[..., None] * C + (i * k_t)[..., None] * v[:, t, ..., None, :]
        n = f * n + i * k_t
        q_t = q_t * m.clamp(max=0).exp()[..., None]
        normaliser = torch.maximum((n * q_t).sum(-1).abs(), (-m.clamp(min=0)).exp()) + eps * m.clamp(max=0).exp()
        outputs.append((q_t[..., None, :] @ C).squeeze(-2) / normaliser[..., None])
    return torch.stack(outputs, 1), (C, n, m)


def _chunked(
    heads: Heads, gates: Gates, scale: float, eps: float, chunk: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Attention inside each chunk, all chunks at once; the recurrence runs only from chunk to chunk.

    With F_i the sum of log f since the chunk's start, F_ij that over j + 1 .. i, M and M' the stabilisers before and
    after the chunk, and m+ = max(m, 0): row i sees the state before the chunk times exp(F_i + M - m+_i) and step j
    times exp(F_ij + log i_j - m+_i); the state after the chunk holds step j times exp(F_Cj + log i_j - M'). Exponents
    are sums in float64, never positive. A stabiliser between chunks cancels, so it is taken as a constant.
    """
    dtype, shape, n_steps = heads.v.dtype, heads.v.shape[2:4], heads.v.shape[1]
    missing = -n_steps % chunk
    log_i = F.pad(_wide(gates.log_i), (0, 0, 0, 0, 0, missing), value=-torch.inf)
    log_f = F.pad(_wide(gates.log_f), (0, 0, 0, 0, 0, missing))
    resets = None if heads.resets is None else F.pad(heads.resets, (0, missing))
    m = _stabilisers(log_i, log_f, gates.m, resets)

    def cut(x: Tensor) -> Tensor:
        """(B, T, G, R or 1, ...) -> (n, heads, C, ...)."""
        x = x.reshape(*x.shape[:4], -1).expand(-1, -1, -1, shape[1], -1)
        return to_chunks(x, chunk).flatten(1, 3)

    q, k, v = cut((heads.q * scale).unsqueeze(3)), cut(heads.k.unsqueeze(3)), cut(heads.v)
    log_i, log_f, m = (cut(x).squeeze(-1) for x in (log_i, log_f, m))
    after = m[..., -1:]
    after = torch.cat([after[:-1].detach(), after[-1:]])
    before = torch.cat([_wide(gates.m).flatten()[None, :, None], after[:-1]])
    row = -m.detach().clamp(min=0)
    since, until, total = (
        log_f.cumsum(-1) + before + row,
        F.pad(log_f[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1) + log_i - after,
        log_f.sum(-1, keepdim=True) + before - after,
    )
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=m.device).tril()
    if resets is not None:
        document = cut(resets[..., None, None].expand(-1, -1, *shape)).squeeze(-1).cumsum(-1)
        keep = keep & (document[..., :, None] == document[..., None, :])
        since = since.masked_fill(document > 0, -torch.inf)
        until = until.masked_fill(document != document[..., -1:], -torch.inf)
        total = total.masked_fill(document[..., -1:] > 0, -torch.inf)
    since, until, total = (x.exp().to(dtype)[..., None] for x in (since, until, total))
    state = torch.cat([heads.state, gates.n[..., None]], -1).flatten(0, 2)
    h, state = _Chunks.apply(q, k, v, log_i, log_f, m, since, until, total, state, keep, eps)[:2]
    state = state.unflatten(0, (-1, *shape))
    m = after[-1].to(dtype).reshape(-1, *shape)
    return from_chunks(h.unflatten(1, (-1, *shape)), n_steps), (
        common.owned(state[..., :-1]),
        common.owned(state[..., -1]),
        m,
    )


def _wide(x: Tensor) -> Tensor:
    """x in float64, in which exponents are summed; in float32 where the device has no other."""
    return x.to(common.widest(x.device))


def _stabilisers(log_i: Tensor, log_f: Tensor, m: Tensor, resets: Tensor | None) -> Tensor:
    """m_t = max(log f_t + m_{t-1}, log i_t) of all steps, (B, T, G, R) in float64, rounded to m's dtype.

    With F_t the sum of log f until t, m_t - F_t is the running maximum of log i_t - F_t. A document starts from m = 0;
    what came before it is kept out of the maximum by lifting each document above the one before.
    """
    if resets is not None:
        log_i = torch.where(resets[..., None, None], torch.maximum(log_i, log_f), log_i)
    sums = log_f.cumsum(1)
    levels = torch.cat([_wide(m)[:, None], log_i - sums], 1)
    lifted = levels.detach()
    if resets is not None:
        lift = 2 * lifted.masked_fill(lifted.isinf(), 0).abs().amax() + 1
        lifted = lifted + lift * F.pad(resets.cumsum(1), (1, 0))[..., None, None]
    index = lifted.cummax(1).indices[:, 1:]
    return _wide((sums + levels.gather(1, index)).to(m.dtype))


class _Chunks(torch.autograd.Function):
    """All that comes after the gates, on (n, heads, C, .), the normaliser as one more column of values, all ones.

    `since`, `until`, `total` (n, heads, C or 1, 1) are the decays to and from the states between chunks; those inside
    chunks are built here. Gradients of gates sum what crosses a step, and subtract nothing: the gradient of a gate that
    is shut is tiny, and right. That of m is eps's alone.
    """

    @staticmethod
    def forward(q, k, v, log_i, log_f, m, since, until, total, state, keep, eps):
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        sums, row = log_f.cumsum(-1), m.clamp(min=0)
        pairs = (sums - row)[..., :, None] + (log_i - sums)[..., None, :]
        pairs = pairs.masked_fill_(~keep, -torch.inf).to(q.dtype).exp_()
        scores = (q @ k.mT).mul_(pairs)
        states = torch.cat([state[None], (k * until).mT @ v])
        for c in range(len(v)):
            states[c + 1].addcmul_(states[c], total[c])
        h = (scores @ v).add_((q * since) @ states[:-1])
        normaliser = h[..., -1:]
        floor, shrink = (-row).exp(), eps * m.clamp(max=0).exp()
        floor, shrink = (x.to(q.dtype)[..., None] for x in (floor, shrink))
        divisor = torch.maximum(normaliser.abs(), floor).add_(shrink)
        free = torch.where(normaliser.abs() > floor, normaliser.sign(), 0)
        h = h[..., :-1] / divisor
        return h, states[-1].clone(), v, pairs, scores, states[:-1], divisor, free, shrink

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, output[0], *output[2:])

    @staticmethod
    @common.without_autocast
    @once(lambda ctx, *d: gradients_of(_by_chunks, (*ctx.saved_tensors[:11], ctx.eps), d[:2]))
    def backward(ctx, d_h, d_last, *_):
        q, k, _, _, _, _, since, until, total, _, _, *rest = ctx.saved_tensors
        h, v, pairs, scores, states, divisor, free, shrink = rest
        d_h = d_h / divisor
        d_divisor = (d_h * h).sum(-1, keepdim=True).neg_()
        d_h = torch.cat([d_h, d_divisor * free], -1)
        d_m = (d_divisor * shrink).squeeze(-1)
        adjoint = torch.cat([(q * since).mT @ d_h, d_last[None]])
        for c in reversed(range(len(q))):
            adjoint[c].addcmul_(adjoint[c + 1], total[c])
        d_scores = d_h @ v.mT
        d_pairs = d_scores * scores
        d_log_i = d_pairs.sum(-2)
        d_log_f = F.pad(d_pairs.cumsum(-1).tril_(-1).sum(-2)[..., :-1], (1, 0))
        d_scores.mul_(pairs)
        d_q, d_k = d_h @ states.mT, v @ adjoint[1:].mT
        d_since, d_until = (q * d_q).sum(-1, keepdim=True), (k * d_k).sum(-1, keepdim=True)
        d_q = d_q.mul_(since).add_(d_scores @ k)
        d_v = (scores.mT @ d_h + (k * until) @ adjoint[1:])[..., :-1]
        d_k = d_k.mul_(until).add_(d_scores.mT @ q)
        d_total = (adjoint[1:] * states).sum((-2, -1))[..., None, None]
        d_gates = (_wide(x) for x in (d_log_i, d_log_f, d_m))
        return d_q, d_k, d_v, *d_gates, d_since, d_until, d_total, adjoint[0], None, None


def _by_chunks(q, k, v, log_i, log_f, m, since, until, total, state, keep, eps) -> tuple[Tensor, Tensor]:
    """`_Chunks` in plain operators. Rows and divisors are times exp(-row), which is a constant, as it cancels."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums, row = log_f.cumsum(-1), m.detach().clamp(min=0)
    pairs = (sums - row)[..., :, None] + (log_i - sums)[..., None, :]
    scores = (q @ k.mT) * pairs.masked_fill(~keep, -torch.inf).to(q.dtype).exp()
    rows = []
    for c in range(len(v)):
        rows.append(scores[c] @ v[c] + (q[c] * since[c]) @ state)
        state = total[c] * state + (k[c] * until[c]).mT @ v[c]
    h = torch.stack(rows)
    floor, shrink = ((-row).exp().to(q.dtype)[..., None], (eps * (m - row).exp()).to(q.dtype)[..., None])
    return h[..., :-1] / (torch.maximum(h[..., -1:].abs(), floor) + shrink), state


def _compiled(
    form: Operator, heads: Heads, gates: Gates, scale: float, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The chunked form in C++, where a head's chunks stay in the nearest cache, or in Triton."""
    q, k, v, _, _, C, resets = heads
    steps, state = [x.flatten(2, 3) for x in (v, *gates[:2])], [x.flatten(1, 2) for x in (C, *gates[2:])]
    h, *last = form(q, k, *steps, *state, resets, scale, eps)[:4]
    C, n, m = (leaf.unflatten(1, v.shape[2:4]) for leaf in last)
    return h.unflatten(2, v.shape[2:4]), (C, n, m)


def _forward(call: Call, q, k, v, log_i, log_f, C, n, m, resets, scale, eps, keep) -> tuple[Tensor | None, ...]:
    """h and the last C, n, m; for the backward pass m and n^T q of all steps, and, with `keep`, C, n, m by chunk."""
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    state = [x.clone() for x in (C, n, m)]
    steps = [torch.empty_like(x) for x in (v, log_i, log_i)]
    kept = [x.new_empty(B, H, -(-T // KERNEL_CHUNK), *x.shape[2:]) if keep else None for x in state]
    reads, writes = (q, k, v, log_i, log_f, resets), (*state, *steps, *kept)
    call("mlstm_forward", reads, writes, B, T, G, H // G, K, V, scale, eps)
    return steps[0], *state, *steps[1:], *kept


def _backward(
    call: Call,
    q,
    k,
    v,
    log_i,
    log_f,
    resets,
    h,
    m_all,
    norm,
    C_kept,
    n_kept,
    m_kept,
    d_h,
    d_last_C,
    d_last_n,
    d_last_m,
    scale,
    eps,
) -> tuple[Tensor, ...]:
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    d_state = [d.clone() for d in (d_last_C, d_last_n, d_last_m)]
    d_steps = [torch.zeros_like(x) for x in (q, k, v, log_i, log_f)]
    reads = (q, k, v, log_i, log_f, resets, h, m_all, norm, C_kept, n_kept, m_kept, d_h)
    call("mlstm_backward", reads, (*d_state, *d_steps), B, T, G, H // G, K, V, scale, eps)
    return *d_steps, *d_state


def _plain(q, k, v, log_i, log_f, C, n, m, resets, scale, eps) -> list[Tensor]:
    """The operator `zoo::mlstm` in plain PyTorch."""
    by_group = (q.shape[2], -1)
    q, k, v = (x.to(C.dtype) for x in (q, k, v))
    v, log_i, log_f = (x.unflatten(2, by_group) for x in (v, log_i, log_f))
    C, n, m = (x.unflatten(1, by_group) for x in (C, n, m))
    chunk = sizes.chunk("mlstm", "chunked")
    h, last = _chunked(Heads(q, k, v, None, None, C, resets), Gates(log_i, log_f, n, m), scale, eps, chunk)
    return [h.flatten(2, 3), *(x.flatten(1, 2) for x in last)]


_mlstm = Operator(
    KERNEL,
    """mlstm(Tensor q, Tensor k, Tensor v, Tensor log_i, Tensor log_f, Tensor C, Tensor n, Tensor m, Tensor? resets,
    float scale, float eps, bool keep) -> (Tensor h, Tensor last_C, Tensor last_n, Tensor last_m, Tensor m_all,
    Tensor norm, Tensor C_kept, Tensor n_kept, Tensor m_kept)""",
    _forward,
    _backward,
    gradients="q k v log_i log_f C n m",
    plain=_plain,
    triton=TRITON,
)
