"""Attention whose keys and values are one compressed vector a step (MLA), in two orders of the same products.

Keys and values of every head are linear in a latent c_s, k_gs = W^K_g c_s and v_gs = W^V_g c_s, beside a rotary key
that all heads share. *Expanded*, they are formed for every step, and attention is as ever. *Absorbed*, W^K_g goes to
the query and W^V_g to the result: all heads then read the latents themselves, one key of r + P numbers a step.

Shape legend: B batch, T new steps, S all steps, H heads, G groups (dividing H), N width of a head's own key, P width of
the shared rotary key, V value width, r width of the latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.ops import common
from zoo.ops._attention import attend
from zoo.ops.attention_forms import Settings, decode
from zoo.ops.common import blank, log_form, valid_steps
from zoo.ops.derivatives import traced
from zoo.ops.kernel import Kernel
from zoo.ops.kv_cache import INITIAL_CAPACITY, KVCache, append, first_cache, in_order_of_time
from zoo.ops.ring import plan_of, ring_attention
from zoo.pieces import Pieces

KERNEL = Kernel("latent_attention")
BACKENDS = ("auto", "reference", "chunked", "sdpa")
LEGEND = (
    "q (B, T, H, N + P); latent (B, T, r); key (B, T, P); expand (G, N + V, r) with G dividing H; lengths (B,) whole "
    "numbers; resets (B, T) bool; state LatentCache of kv (B, rows, r + P), length (B,)."
)
EXPANDED_LIMIT = 1 << 26  # numbers of an expanded cache above which it is never formed

ROWS_A_THREAD = 1024  # fewer are not worth a thread of their own


class LatentCache(NamedTuple):
    """The latents and rotary keys of the current document, position p in row p; grows by doubling.

    Attributes:
        kv: (B, rows, r + P), latent before key, unwritten rows zero.
        length: (B,) int64, steps of the current document so far.
    """

    kv: Tensor
    length: Tensor

    @classmethod
    def empty(cls, batch_size: int, width: int, capacity: int | None = None, *, device=None, dtype=None) -> LatentCache:
        """No steps, with room for `capacity` (256 where not given); width is r + P."""
        rows = max(INITIAL_CAPACITY if capacity is None else capacity, 1)
        kv = torch.zeros(batch_size, rows, width, device=device, dtype=dtype)
        return cls(kv, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def canonical(self) -> LatentCache:
        """Trimmed to the longest row."""
        return in_order_of_time(self)


@common.without_autocast
def latent_attention(
    q: Tensor,
    latent: Tensor,
    key: Tensor,
    expand: Tensor,
    state: LatentCache | None = None,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    pieces: Pieces | None = None,
    scale: float | None = None,
    absorb: bool | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LatentCache | tuple[()]]:
    """o_ht = sum_s p_hts W^V_g c_s with p_hts = softmax_s scale (q_ht[:N] . W^K_g c_s + q_ht[N:] . key_s).

    Args:
        q: (B, T, H, N + P).
        latent: c, (B, T, r).
        key: (B, T, P), P from 1.
        expand: (G, N + V, r), in each group W^K over W^V; consecutive H / G heads share a group.
        state: cache of the steps before; None for none. Consumed: written in place where no gradient is needed.
        causal: no step sees a later one. Otherwise there is no state: `()` is returned.
        lengths: (B,) valid steps of a right-padded batch; nothing sees the later ones, whose outputs are zero.
        resets: (B, T) bool, true where a packed document starts; a step sees its own document only.
        pieces: of a sequence that is cut over processes, of which the other arguments are one piece, see
            `zoo.ops.ring`: the latents go round. Then there is no state.
        scale: (N + P) ** -0.5 by default.
        absorb: the order of the products. By default absorbed where a state is given and T is so small that expanding
            the cache would cost more, or take more memory than it should; else expanded.
        chunk_size, backend: as of `attention`; under "auto", single steps without gradients go through a compiled
            kernel where there is one, which reads the cache once.
    Returns:
        o (B, T, H, V) and the next state.
    Raises:
        UsageError: shapes or options that do not go together.
    """
    lengths = check_latents("latent_attention", LEGEND, q, latent, key, expand, state, causal, lengths, resets)
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    (_, T, H, width), P, r = q.shape, key.shape[-1], latent.shape[-1]
    N = width - P
    V = expand.shape[1] - N
    settings = Settings(width**-0.5 if scale is None else scale, None, None, chunk_size, backend)
    kv = torch.cat([latent, key], -1)
    if pieces is not None:
        plan = plan_of(q, pieces, causal, None, resets)
        return ring_attention(q, kv, (expand,), lambda kv, w: keys_and_values(kv, w, N, r), plan, settings), ()
    if lengths is not None:
        padding = ~valid_steps(lengths, T)
        q, kv = blank(q, padding), blank(kv, padding)
    if state is not None:
        kv = kv.to(state.kv.dtype).to(q.dtype)  # what the cache rounds is rounded in this pass too
    if absorb is None:
        absorb = cheaper_absorbed(T, H, expand, N, None if state is None else state.kv)
    after: LatentCache | None = None
    past: KVCache | None = None
    if absorb:
        keys, values = expand.to(q.dtype).split([N, V], 1)  # (G, N, r), (G, V, r)
        q = torch.cat([per_group(q[..., :N], keys), q[..., N:]], -1)
        if state is not None and T == 1:
            after = append(state, kv, lengths=lengths, resets=resets)
            o = decode_latents(q, after, r, settings)
        else:
            past = None if state is None else _as_one_head(state, r)
            o = attend(q, kv[:, :, None], kv[:, :, None, :r], past, causal, None, lengths, resets, settings)
        o = per_group(o, values.mT)
    else:
        past = None if state is None else _expanded(state, expand, N, r, q.dtype)
        k, v = keys_and_values(kv, expand, N, r)
        o = attend(q, k, v, past, causal, None, lengths, resets, settings)
    o = o if lengths is None else blank(o, padding)
    if not causal:
        return o, ()
    if state is None:
        after = first_cache(LatentCache, kv, lengths=lengths, resets=resets)
    elif after is None:
        after = append(state, kv, lengths=lengths, resets=resets)
    assert after is not None
    return o, after


def cheaper_absorbed(n_steps: int, n_heads: int, expand: Tensor, N: int, cached: Tensor | None) -> bool:
    """Whether steps that meet the rows `cached` (B, rows, r + P) read them as they lie, rather than expanded."""
    if cached is None:
        return False
    (G, both, r), rows = expand.shape, cached[..., 0].numel()
    # a key costs r (N + V) a group to expand, and saves each of its queries 2 r - N - V a head
    few_steps = n_steps * n_heads * (2 * r - both) < G * r * both
    return few_steps or rows * G * both > EXPANDED_LIMIT


def decode_latents(q: Tensor, cache: LatentCache, r: int, settings: Settings) -> Tensor:
    """One absorbed query (B, 1, H, r + P) a row: (B, 1, H, r)."""
    kv = cache.kv
    learns = torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)
    plain = settings.backend != "auto" or learns or torch.compiler.is_compiling()
    if plain or KERNEL.why_not(q, kv) is not None:
        return decode(q, _as_one_head(cache, r), settings)
    log_form("attention", "compiled")
    (B, rows, W), H, threads = kv.shape, q.shape[2], torch.get_num_threads()
    held = cache.length.clamp(1, rows)  # an empty row of the batch sees one zero key instead of none
    parts = max(1, min(-(-threads // B), rows // ROWS_A_THREAD))
    o, total = q.new_empty(B, parts, H, r), q.new_empty(B, parts, H)
    q = (q * settings.scale).contiguous()
    KERNEL("latent_decode", (q, kv, held), (o, total), B, rows, H, W, r, parts, threads)
    return torch.einsum("bphr, bph -> bhr", o, total.softmax(1)).unsqueeze(1) if parts > 1 else o


def per_group(x: Tensor, weight: Tensor) -> Tensor:
    """Each group's heads times its matrix: (B, T, H, M) with (G, M, M') to (B, T, H, M')."""
    (B, T, H, _), G = x.shape, len(weight)
    x = x.unflatten(2, (G, H // G)).movedim(2, 0).flatten(1, 3)  # (G, B T R, M)
    return (x @ weight).unflatten(1, (B, T, H // G)).movedim(0, 2).flatten(2, 3)


def _as_one_head(cache: LatentCache, r: int) -> KVCache:
    kv = cache.kv.unsqueeze(2)
    return KVCache(kv, kv[..., :r], cache.length)


def keys_and_values(kv: Tensor, expand: Tensor, N: int, r: int) -> tuple[Tensor, Tensor]:
    """kv (B, S, r + P) to k (B, S, G, N + P) and v (B, S, G, V)."""
    both = (kv[..., :r] @ expand.to(kv.dtype).flatten(0, 1).mT).unflatten(-1, expand.shape[:2])
    key = kv[:, :, None, r:].expand(-1, -1, len(expand), -1)
    return torch.cat([both[..., :N], key], -1), both[..., N:]


def _expanded(cache: LatentCache, expand: Tensor, N: int, r: int, dtype: torch.dtype) -> KVCache | None:
    """Keys and values of the written rows; None if there are none."""
    rows = cache.kv.shape[1]
    if not traced() and not (rows := int(cache.length.max())):
        return None
    return KVCache(*keys_and_values(cache.kv[:, :rows].to(dtype), expand, N, r), cache.length)


def check_latents(op, legend, q, latent, key, expand, state, causal, lengths, resets) -> Tensor | None:
    """What every op over latents is given fits together: shapes, devices, dtypes.

    Returns:
        The lengths as int64 from 0 to T.
    Raises:
        UsageError: it does not.
    """
    fits = q.ndim == 4 and latent.ndim == key.ndim == expand.ndim == 3
    if not fits or 0 in (*q.shape, *latent.shape, *key.shape, *expand.shape) or q.shape[2] % len(expand):
        shapes = f"q {tuple(q.shape)}, latent {tuple(latent.shape)}, key {tuple(key.shape)}, expand"
        raise UsageError(f"{op}: {shapes} {tuple(expand.shape)} do not go together. Shapes: {legend}")
    (B, T, _, width), r, P = q.shape, latent.shape[-1], key.shape[-1]
    N = width - P
    if N < 1 or expand.shape[1] <= N:
        raise UsageError(f"{op}: q is {width} wide and key {P}: N = {N} should be in 1 to {expand.shape[1] - 1}.")
    common.check(op, legend, "latent", latent, q, (B, T, r))
    common.check(op, legend, "key", key, q, (B, T, P))
    common.check(op, legend, "expand", expand, q, (*expand.shape[:2], r))
    lengths = common.check_packing(op, legend, q, lengths, resets)
    if not q.is_floating_point() or latent.dtype != q.dtype or key.dtype != q.dtype:
        given = f"{q.dtype}, {latent.dtype}, {key.dtype}"
        raise UsageError(f"{op}: q, latent, key are {given}, expected one floating-point dtype.")
    if state is not None:
        if not causal:
            raise UsageError(f"{op}: attention that is not causal reads whole sequences and takes no state.")
        common.check(op, legend, "state.kv", state.kv, q, (B, state.kv.shape[1], r + P))
        common.check_counts(op, legend, state.length, q)
    return lengths
