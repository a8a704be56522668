"""Softmax attention, o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys that step t sees.

Shape legend: B batch, T new steps, S keys, H heads, G groups (dividing H; R = H / G heads share a group's k and v),
K key and V value width of a head, N rows of a cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.ops import attention_forms as forms
from zoo.ops import common
from zoo.ops.attention_forms import Settings
from zoo.ops.common import blank, state_dtype, valid_steps, widest
from zoo.ops.derivatives import traced, transformed
from zoo.ops.kv_cache import DecayingCache, KVCache, append, first_cache, room_for_step
from zoo.ops.ring import plan_of, ring_attention
from zoo.ops.single_step import attention_step
from zoo.ops.visibility import visibility_of
from zoo.pieces import Pieces

BACKENDS = ("auto", "reference", "chunked", "sdpa")
LEGEND = (
    "q (B, T, H, K); k (B, T, G, K) and v (B, T, G, V) with G dividing H; sinks (H,); log_decay (B, T, H); "
    "lengths and prefix (B,) whole numbers; resets (B, T) bool; "
    "state KVCache of k (B, N, G, K), v (B, N, G, V), length (B,); "
    "of attention with log_decay a DecayingCache, which has log_decay (B, N, H) too."
)
MASK_LIMIT = 1 << 22  # rows x queries x keys up to which torch's kernel with an explicit mask is the faster form


@common.without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVCache | DecayingCache | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    log_decay: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any]:
    """o_t = sum_s p_ts v_s with p_ts = exp(l_ts) / (exp(sink) + sum_s' exp(l_ts')), l_ts = cap(scale q_t . k_s).

    With `log_decay` g, l_ts = cap(scale q_t . k_s) + g_{s+1} + ... + g_t (Lin et al. 2025, arXiv 2503.02130).

    Args:
        q: (B, T, H, K).
        k: (B, T, G, K), G dividing H; consecutive H / G heads share a group.
        v: (B, T, G, V).
        state: cache of the steps before; None for none. Consumed: written in place where no gradient is needed.
        causal: no step sees a later one. Otherwise there is no state: `()` is returned.
        window: a step sees itself and the window - 1 keys before it (if not causal, as many after it).
        sinks: (H,) logits of one more key without a value (GPT-OSS); none by default.
        softcap: c in cap(l) = c tanh(l / c) (Gemma 2); none by default.
        log_decay: (B, T, H), finite and never positive; only if causal. A step's own decay acts on the keys before it.
        lengths: (B,) valid steps of a right-padded batch; nothing sees the later ones, whose outputs are zero.
        resets: (B, T) bool, true where a packed document starts; a step sees its own document only.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece, see
            `zoo.ops.ring`. Then there is no state.
        prefix: (B,) whole numbers from 0 to T: the first steps of each row that see each other, as a prompt does
            (prefix-LM); the later steps are causal. Not beside resets, pieces or log_decay.
        scale: K ** -0.5 by default.
        chunk_size: queries a block of the chunked form; by default 128 (half a window), fewer for large batches.
        backend: "reference" forms all T x S scores. "chunked" goes through blocks of queries, and recomputes
            their scores in the backward pass (Dao 2023, FlashAttention-2): memory linear in T. "sdpa" is
            `torch.nn.functional.scaled_dot_product_attention`, with a T x S mask unless plainly causal or not at
            all; it knows neither sinks nor softcap nor log_decay. "auto" takes the fastest, and gives sinks
            to sdpa as one more key where no mask is needed.
    Returns:
        o (B, T, H, V) and the next state.
    Raises:
        UsageError: shapes or options that do not go together.
    """
    if (
        state is not None
        and backend == "auto"
        and log_decay is lengths is resets is pieces is prefix is None
        and causal
    ):
        done = _one_step(q, k, v, state, window, sinks, softcap, scale)
        if done is not None:
            return done
    lengths = _check(q, k, v, state, causal, window, sinks, softcap, log_decay, lengths, resets, chunk_size, backend)
    prefix = _check_prefix(prefix, q, causal and log_decay is None and resets is None and pieces is None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is not None:
        padding = ~valid_steps(lengths, q.shape[1])
        q, k, v = (blank(x, padding) for x in (q, k, v))
        log_decay = None if log_decay is None else blank(log_decay, padding)
    new: tuple[Tensor, ...] = (k, v) if log_decay is None else (k, v, log_decay.to(state_dtype(q)))
    options = Settings(scale, softcap, sinks, chunk_size, backend)
    if pieces is not None:
        if log_decay is not None:
            raise UsageError("attention: pieces are not served with log_decay: cut the mixer by its state.")
        plan, visiting, K = plan_of(q, pieces, causal, window, resets), torch.cat([k, v], -1), q.shape[-1]
        return ring_attention(q, visiting, (), lambda kv: (kv[..., :K], kv[..., K:]), plan, options), ()
    if state is not None and q.shape[1] == 1:
        after: Any = append(state, *new, window=window, lengths=lengths, resets=resets)
        o = forms.decode(q, after, options)
    else:
        decay = None if log_decay is None else new[-1]
        o = attend(q, k, v, state, causal, window, lengths, resets, options, decay, prefix)
        if not causal:
            return (o if lengths is None else blank(o, padding)), ()
        if state is None:
            kind: type[Any] = KVCache if log_decay is None else DecayingCache
            after = first_cache(kind, *new, window=window, lengths=lengths, resets=resets)
        else:
            after = append(state, *new, window=window, lengths=lengths, resets=resets)
    return (o if lengths is None else blank(o, padding)), after


def _one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVCache | DecayingCache,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, KVCache] | None:
    """A single step in one call, None where it is not; what does not fit is left to the checks."""
    if torch.compiler.is_compiling() or not isinstance(state, KVCache) or q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return None
    (B, T, H, K), (_, _, G, V), N = q.shape, v.shape, state.k.shape[1]
    if T != 1 or not G or H % G or k.shape != (B, 1, G, K) or v.shape != (B, 1, G, V) or state.length.shape != (B,):
        return None
    if state.k.shape != (B, N, G, K) or state.v.shape != (B, N, G, V) or (sinks is not None and sinks.shape != (H,)):
        return None
    if (window is not None and (type(window) is not int or window < max(N, 1))) or (
        softcap is not None and softcap <= 0
    ):
        return None
    if transformed() or not state.length.is_cpu or torch._C._len_torch_dispatch_stack():
        return None
    state = room_for_step(state, window)
    scale = K**-0.5 if scale is None else scale
    o = attention_step(q, k, v, *state, sinks, scale, softcap)
    return None if o is None else (o, state)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: KVCache | DecayingCache | None,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    options: Settings,
    log_decay: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """T queries against the cache (left as it is) and the T new keys."""
    T, n_past = q.shape[1], 0
    if past is not None:
        n_past = past.k.shape[1]
        if not traced():
            n_past = min(n_past, int(past.length.max()))
        # what the cache rounds is rounded in this pass too, so that no cut shows
        k, v = (x.to(past.k.dtype).to(q.dtype) for x in (k, v))
        past = past if n_past else None
    sums = None if log_decay is None else log_decay.to(widest(q.device)).cumsum(1)
    if isinstance(past, DecayingCache) and sums is not None:
        old = forms.sums_of_decays(past, n_past)
        sums = torch.cat([old - forms.newest(old, past), sums], 1)
    if past is not None:
        k, v = (torch.cat([old[:, :n_past].to(q.dtype), x], 1) for old, x in ((past.k, k), (past.v, v)))
    window = window if window is not None and window < T + n_past else None
    ragged = lengths is not None and not causal
    masked = past is not None or window is not None or resets is not None or ragged or prefix is not None
    small = sums is None and len(q) * T * k.shape[1] <= MASK_LIMIT and (window is None or window + 64 >= T / 3)
    precise = q.dtype == state_dtype(q) and options.scale != 0
    form = options.form(sdpa=small or not (masked or sums is not None), sinks=not masked and precise)
    if form == "sdpa" and not masked:
        return forms.sdpa(q, k, v, None, options, causal=causal)
    visibility = visibility_of(T, past, n_past, causal, window, lengths, resets, q.device, prefix)
    if form == "chunked":
        return forms.chunked(q, k, v, visibility, n_past, causal and prefix is None, window, options, sums)
    if form == "sdpa":
        return forms.sdpa(q, k, v, visibility.mask(), options)
    fade = None if sums is None else (sums[:, -T:, None] - sums[:, None]).movedim(3, 1)
    return forms.reference(q, k, v, visibility.mask(), options, fade)


def _check_prefix(prefix: Tensor | None, q: Tensor, alone: bool) -> Tensor | None:
    """The prefix as int64 from 0 to T; None for a single step, which is no prompt."""
    if prefix is None:
        return None
    common.check("attention", LEGEND, "prefix", prefix, q, tuple(q.shape[:1]))
    if not alone:
        raise UsageError("attention: a prefix goes with causal=True, and not with resets, pieces or log_decay.")
    if prefix.is_floating_point() or prefix.dtype == torch.bool:
        raise UsageError(f"attention: prefix is {prefix.dtype}, expected the whole number of steps of each prompt.")
    return None if q.shape[1] == 1 else prefix.long().clamp(0, q.shape[1])


def _check(
    q, k, v, state, causal, window, sinks, softcap, log_decay, lengths, resets, chunk_size, backend
) -> Tensor | None:
    """The lengths as int64 from 0 to T, once everything fits together."""
    op = "attention"
    if not (q.ndim == k.ndim == v.ndim == 4) or 0 in (*q.shape, *k.shape, *v.shape) or q.shape[2] % k.shape[2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise UsageError(f"{op}: {shapes} do not go together. Shapes: {LEGEND}")
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    common.check(op, LEGEND, "k", k, q, (B, T, G, K))
    common.check(op, LEGEND, "v", v, q, (B, T, G, V))
    common.check(op, LEGEND, "sinks", sinks, q, (H,))
    common.check(op, LEGEND, "log_decay", log_decay, q, (B, T, H))
    lengths = common.check_packing(op, LEGEND, q, lengths, resets)
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise UsageError(f"{op}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one floating-point dtype.")
    for name, value in (("window", window), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{op}: {name}={value!r} is not allowed: it should be a whole number from 1.")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise UsageError(f"{op}: softcap={softcap!r} is not allowed: it should be a number above 0.")
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if log_decay is not None and not (log_decay.is_floating_point() and causal):
        raise UsageError(f"{op}: log_decay is {log_decay.dtype} and causal={causal}, expected floats and causal=True.")
    if backend == "sdpa" and not (sinks is softcap is log_decay is None):
        missing = "sinks" if sinks is not None else "softcap" if softcap is not None else "log_decay"
        raise UsageError(f'{op}: backend="sdpa" does not know {missing}: take "auto", "chunked" or "reference".')
    if state is not None and not causal:
        raise UsageError(f"{op}: attention that is not causal reads whole sequences and takes no state.")
    if state is not None and isinstance(state, DecayingCache) != (log_decay is not None):
        raise UsageError(f"{op}: a DecayingCache is the state of attention with log_decay, a KVCache of that without.")
    if state is not None:
        N = state.k.shape[1]
        common.check(op, LEGEND, "state.k", state.k, q, (B, N, G, K))
        common.check(op, LEGEND, "state.v", state.v, q, (B, N, G, V))
        common.check_counts(op, LEGEND, state.length, q)
        if log_decay is not None:
            common.check(op, LEGEND, "state.log_decay", state.log_decay, q, (B, N, H))
        if window is not None and window < N:
            raise UsageError(f"{op}: state has {N} rows, more than window={window}: it is of another window.")
    return lengths
