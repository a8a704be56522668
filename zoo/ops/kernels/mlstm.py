"""The matrix LSTM for GPUs: see `mlstm.cpp`, whose functions, names and shapes these are.

One launch finds the stabilisers of all steps, one runs from chunk to chunk, and one gives the outputs of all chunks at
once; the backward pass has such launches too. Exponents are sums in float64. Operands are multiplied in the dtype of q,
k and v: in exact float32, or in bfloat16; states, gates and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.tiles import tile

CHUNK = 64  # steps between kept states
NARROW, WIDE, HEADS, ROWS = 32, 64, 16, 32


@triton.jit
def _after(f, i, g, j):
    """The map m -> max(f + m, i), then m -> max(g + m, j)."""
    return f + g, tl.maximum(i + g, j)


@triton.jit
def _stabilisers(log_i, log_f, resets, m, m_all, before, T, H, C: tl.constexpr, HEADS: tl.constexpr):
    """m_t = max(log f_t + m_{t-1}, log i_t) of all steps, and of those before a chunk; `m` gets the last one."""
    row = tl.program_id(1).to(tl.int64)
    head, time = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, C)
    inside = head < H
    x = tl.load(m + row * H + head, mask=inside, other=0.0).to(tl.float64)
    for start in range(0, T, C):
        tl.store(before + (row * H + head) * tl.cdiv(T, C) + start // C, x, mask=inside)
        t = start + time
        at, there = (row * T + t)[:, None] * H + head[None, :], (t < T)[:, None] & inside[None, :]
        f = tl.load(log_f + at, mask=there, other=0.0).to(tl.float64)
        i = tl.load(log_i + at, mask=there, other=-float("inf")).to(tl.float64)
        if resets is not None:
            fresh = tl.load(resets + row * T + t, mask=t < T, other=0)[:, None] != 0
            i = tl.where(fresh, tl.maximum(f, i), i)
            f = tl.where(fresh, -float("inf"), f)
        f, i = tl.associative_scan((f, i), 0, _after)
        y = tl.maximum(f + x[None, :], i)
        tl.store(m_all + at, y, mask=there)
        x = tl.sum(tl.where((time == C - 1)[:, None], y, 0.0), 0).to(tl.float32).to(tl.float64)  # as it is kept
    tl.store(m + row * H + head, x, mask=inside)


@triton.jit
def _gates(log_i, log_f, resets, m_all, before, row, head, chunk, scale, T, H, C: tl.constexpr):
    """The gates of a chunk.

    Returns:
        exponents of rows and of columns, whose sums are those of pairs of steps, in float64, and the document of every
        step; factors from the state before the chunk (times scale), to that after it, and between the two.
    """
    t = chunk * C + tl.arange(0, C)
    at, there = (row * T + t) * H + head, t < T
    f = tl.load(log_f + at, mask=there, other=0.0).to(tl.float64)
    level = tl.load(log_i + at, mask=there, other=-float("inf")).to(tl.float64)
    m = tl.load(m_all + at, mask=there, other=0.0).to(tl.float64)
    last = tl.load(m_all + (row * T + tl.minimum(chunk * C + C, T) - 1) * H + head).to(tl.float64)
    first = tl.load(before + (row * H + head) * tl.cdiv(T, C) + chunk).to(tl.float64)
    sums, whole = tl.cumsum(f, 0), tl.sum(f, 0)
    rows = tl.where(there, sums - tl.maximum(m, 0.0), -float("inf"))
    columns = level - sums
    since = scale * tl.exp((rows + first).to(tl.float32))
    until = tl.exp((columns + (whole - last)).to(tl.float32))
    total = tl.exp((whole + first - last).to(tl.float32))
    document = tl.zeros((C,), tl.int32)
    if resets is not None:
        starts = (tl.load(resets + row * T + t, mask=there, other=0) != 0).to(tl.int32)
        document, latest = tl.cumsum(starts, 0), tl.sum(starts, 0)
        since = tl.where(document > 0, 0.0, since)
        until = tl.where(document < latest, 0.0, until)
        total = tl.where(latest > 0, 0.0, total)
    return rows, columns, document, since, until, total


@triton.jit
def _pairs(rows, columns, document, scale, C: tl.constexpr):
    """How much step i sees of step j, (C, C), times scale."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    seen = (i >= j) & (document[:, None] == document[None, :])
    return tl.where(seen, scale * tl.exp((rows[:, None] + columns[None, :]).to(tl.float32)), 0.0)


@triton.jit
def _place(T, G, H, C: tl.constexpr):
    """Which chunk of which head a program has, where there is one for each.

    Returns:
        number of the chunk in (B, H, chunks); its row, its head, and its number in them; places of its steps in
        (B, T, H), and in (B, T, G) for what heads share; which of the steps there are.
    """
    number, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(T, C)
    at, chunk = number // chunks, (number % chunks).to(tl.int32)
    row, head, t = at // H, at % H, chunk * C + tl.arange(0, C)
    return number, row, head, chunk, (row * T + t) * H + head, (row * T + t) * G + head // (H // G), t < T


@triton.jit
def _block(x, steps, there, width, columns):
    """x (.., width) at the steps and columns, (C, n); zeros beyond."""
    mask = there[:, None] & (columns < width)[None, :]
    return tl.load(x + steps[:, None] * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _divided(d_h, factors, steps, there, V, columns):
    """The gradient of numerators: that of outputs times the factors of the rows."""
    factor = tl.load(factors + steps, mask=there, other=0.0)
    return _block(d_h, steps, there, V, columns).to(tl.float32) * factor[:, None]


@triton.jit
def _states(
    k,
    v,
    log_i,
    log_f,
    resets,
    m_all,
    before,
    memory,
    normaliser,
    states,
    norms,
    T,
    G,
    H,
    K,
    V,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """From chunk to chunk: a block of one head's memory; the programs of the first values have its normaliser too."""
    at = tl.program_id(0).to(tl.int64)
    row, head, n = at // H, at % H, tl.cdiv(T, C)
    a, e = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    cells, inside = a[:, None] * V + e[None, :], (a < K)[:, None] & (e < V)[None, :]
    own = a < tl.where(tl.program_id(2) == 0, K, 0)
    S = tl.load(memory + at * K * V + cells, mask=inside, other=0.0)
    N = tl.load(normaliser + at * K + a, mask=own, other=0.0)
    for chunk in range(n):
        tl.store(states + (at * n + chunk) * K * V + cells, S, mask=inside)
        tl.store(norms + (at * n + chunk) * K + a, N, mask=own)
        _, _, _, _, until, total = _gates(log_i, log_f, resets, m_all, before, row, head, chunk, 1.0, T, H, C)
        t = chunk * C + tl.arange(0, C)
        wide = _block(k, (row * T + t) * G + head // (H // G), t < T, K, a).to(tl.float32) * until[:, None]
        values = _block(v, (row * T + t) * H + head, t < T, V, e)
        S = tl.dot(tl.trans(wide.to(values.dtype)), values, total * S, input_precision="ieee")
        N = total * N + tl.sum(wide, 0)
    tl.store(memory + at * K * V + cells, S, mask=inside)
    tl.store(normaliser + at * K + a, N, mask=own)


@triton.jit
def _outputs(
    q,
    k,
    v,
    log_i,
    log_f,
    resets,
    m_all,
    before,
    states,
    norms,
    h,
    norm,
    T,
    G,
    H,
    K,
    V,
    scale,
    eps,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A block of the outputs of one chunk."""
    number, row, head, chunk, steps, shared, there = _place(T, G, H, C)
    e = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    rows, columns, document, since, _, _ = _gates(log_i, log_f, resets, m_all, before, row, head, chunk, scale, T, H, C)
    scores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, VALUES), tl.float32)
    size = tl.zeros((C,), tl.float32)
    for start in range(0, K, KEYS):
        a = start + tl.arange(0, KEYS)
        query, keys = _block(q, shared, there, K, a), _block(k, shared, there, K, a)
        scores = tl.dot(query, tl.trans(keys), scores, input_precision="ieee")
        wide = query.to(tl.float32) * since[:, None]
        inside = (a < K)[:, None] & (e < V)[None, :]
        S = tl.load(states + number * K * V + a[:, None] * V + e[None, :], mask=inside, other=0.0)
        out = tl.dot(wide.to(query.dtype), S.to(query.dtype), out, input_precision="ieee")
        size += tl.sum(wide * tl.load(norms + number * K + a, mask=a < K, other=0.0)[None, :], 1)
    scores *= _pairs(rows, columns, document, scale, C)
    size += tl.sum(scores, 1)
    values = _block(v, steps, there, V, e)
    out = tl.dot(scores.to(values.dtype), values, out, input_precision="ieee")
    m = tl.load(m_all + steps, mask=there, other=0.0)
    divisor = tl.maximum(tl.abs(size), tl.exp(-tl.maximum(m, 0.0))) + eps * tl.exp(tl.minimum(m, 0.0))
    tl.store(h + steps[:, None] * V + e[None, :], out / divisor[:, None], mask=there[:, None] & (e < V)[None, :])
    if tl.program_id(1) == 0:
        tl.store(norm + steps, size, mask=there)


@triton.jit
def _divisors(h, norm, m_all, d_h, factors, d_norm, d_m, count, V, eps, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """Of every step the factor 1 / divisor, and the gradients of n^T q and, by eps alone, of m."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < count
    product = tl.zeros((ROWS,), tl.float32)
    for start in range(0, V, VALUES):
        e = start + tl.arange(0, VALUES)
        theirs, ours = _block(d_h, r, inside, V, e), _block(h, r, inside, V, e)
        product += tl.sum(theirs.to(tl.float32) * ours.to(tl.float32), 1)
    x, m = tl.load(norm + r, mask=inside, other=0.0), tl.load(m_all + r, mask=inside, other=0.0)
    size, floor, shrink = tl.abs(x), tl.exp(-tl.maximum(m, 0.0)), eps * tl.exp(tl.minimum(m, 0.0))
    factor = 1.0 / (tl.maximum(size, floor) + shrink)
    share = -factor * product
    tl.store(factors + r, factor, mask=inside)
    tl.store(d_norm + r, tl.where(size > floor, tl.where(x > 0, share, -share), 0.0), mask=inside)
    tl.store(d_m + r, share * shrink, mask=inside)


@triton.jit
def _adjoints(
    q,
    log_i,
    log_f,
    resets,
    m_all,
    before,
    states,
    norms,
    d_h,
    factors,
    d_norm,
    d_memory,
    d_normaliser,
    adjoints,
    d_norms,
    d_totals,
    T,
    G,
    H,
    K,
    V,
    scale,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """From chunk to chunk, backwards: the gradients of the states after them, and of the factors between them, whose
    parts (key blocks, value blocks, B, H, n) are summed later."""
    at = tl.program_id(0).to(tl.int64)
    row, head, n = at // H, at % H, tl.cdiv(T, C)
    a, e = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    cells, inside = a[:, None] * V + e[None, :], (a < K)[:, None] & (e < V)[None, :]
    own = a < tl.where(tl.program_id(2) == 0, K, 0)
    part = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(0).to(tl.int64) + at
    A = tl.load(d_memory + at * K * V + cells, mask=inside, other=0.0)
    N = tl.load(d_normaliser + at * K + a, mask=own, other=0.0)
    for back in range(n):
        chunk = n - 1 - back
        tl.store(adjoints + (at * n + chunk) * K * V + cells, A, mask=inside)
        tl.store(d_norms + (at * n + chunk) * K + a, N, mask=own)
        _, _, _, since, _, total = _gates(log_i, log_f, resets, m_all, before, row, head, chunk, scale, T, H, C)
        S = tl.load(states + (at * n + chunk) * K * V + cells, mask=inside, other=0.0)
        beside = tl.load(norms + (at * n + chunk) * K + a, mask=own, other=0.0)
        tl.store(d_totals + part * n + chunk, total * (tl.sum(tl.sum(A * S, 1), 0) + tl.sum(N * beside, 0)))
        t = chunk * C + tl.arange(0, C)
        steps = (row * T + t) * H + head
        query = _block(q, (row * T + t) * G + head // (H // G), t < T, K, a)
        wide = query.to(tl.float32) * since[:, None]
        dh = _divided(d_h, factors, steps, t < T, V, e).to(query.dtype)
        A = tl.dot(tl.trans(wide.to(query.dtype)), dh, total * A, input_precision="ieee")
        N = total * N + tl.sum(wide * tl.load(d_norm + steps, mask=t < T, other=0.0)[:, None], 0)
    tl.store(d_memory + at * K * V + cells, A, mask=inside)
    tl.store(d_normaliser + at * K + a, N, mask=own)


@triton.jit
def _values(
    q,
    k,
    log_i,
    log_f,
    resets,
    m_all,
    before,
    d_h,
    factors,
    adjoints,
    d_v,
    T,
    G,
    H,
    K,
    V,
    scale,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A block of the gradients of one chunk's values."""
    number, row, head, chunk, steps, shared, there = _place(T, G, H, C)
    e = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    rows, columns, document, _, until, _ = _gates(log_i, log_f, resets, m_all, before, row, head, chunk, scale, T, H, C)
    scores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, VALUES), tl.float32)
    for start in range(0, K, KEYS):
        a = start + tl.arange(0, KEYS)
        query, keys = _block(q, shared, there, K, a), _block(k, shared, there, K, a)
        scores = tl.dot(query, tl.trans(keys), scores, input_precision="ieee")
        inside = (a < K)[:, None] & (e < V)[None, :]
        A = tl.load(adjoints + number * K * V + a[:, None] * V + e[None, :], mask=inside, other=0.0)
        wide = (keys.to(tl.float32) * until[:, None]).to(keys.dtype)
        out = tl.dot(wide, A.to(keys.dtype), out, input_precision="ieee")
    scores *= _pairs(rows, columns, document, scale, C)
    dh = _divided(d_h, factors, steps, there, V, e).to(d_v.dtype.element_ty)
    out = tl.dot(tl.trans(scores.to(dh.dtype)), dh, out, input_precision="ieee")
    tl.store(d_v + steps[:, None] * V + e[None, :], out, mask=there[:, None] & (e < V)[None, :])


@triton.jit
def _keys(
    q,
    k,
    v,
    log_i,
    log_f,
    resets,
    m_all,
    before,
    states,
    norms,
    d_h,
    factors,
    d_norm,
    adjoints,
    d_norms,
    d_totals,
    d_q,
    d_k,
    d_log_i,
    d_log_f,
    from_state,
    to_state,
    parts,
    T,
    G,
    H,
    K,
    V,
    scale,
    C: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The gradients of one chunk's q and k, of each head its own (B, T, H, K), and of its gates but for the way by m.

    Those of gates sum what crosses a step, and subtract nothing: that of a gate that is shut is tiny, and right.
    """
    number, row, head, chunk, steps, shared, there = _place(T, G, H, C)
    rows, columns, document, since, until, _ = _gates(
        log_i, log_f, resets, m_all, before, row, head, chunk, scale, T, H, C
    )
    scores, d_scores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for start in range(0, K, KEYS):
        a = start + tl.arange(0, KEYS)
        query, keys = _block(q, shared, there, K, a), _block(k, shared, there, K, a)
        scores = tl.dot(query, tl.trans(keys), scores, input_precision="ieee")
    for start in range(0, V, VALUES):
        e = start + tl.arange(0, VALUES)
        values = _block(v, steps, there, V, e)
        dh = _divided(d_h, factors, steps, there, V, e).to(values.dtype)
        d_scores = tl.dot(dh, tl.trans(values), d_scores, input_precision="ieee")
    of_norm = tl.load(d_norm + steps, mask=there, other=0.0)
    pairs = _pairs(rows, columns, document, scale, C)
    d_scores = (d_scores + of_norm[:, None]) * pairs
    d_pairs = d_scores * scores
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    of_level = tl.sum(d_pairs, 0)
    of_decay = tl.sum(tl.where(i > j, tl.cumsum(d_pairs, 0, reverse=True), 0.0), 1)
    d_since, d_until = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for start in range(0, K, KEYS):
        a = start + tl.arange(0, KEYS)
        wide, other = tl.zeros((C, KEYS), tl.float32), tl.zeros((C, KEYS), tl.float32)
        for first in range(0, V, VALUES):
            e = first + tl.arange(0, VALUES)
            at_cells = number * K * V + e[:, None] + a[None, :] * V
            inside = (e < V)[:, None] & (a < K)[None, :]
            values = _block(v, steps, there, V, e)
            dh = _divided(d_h, factors, steps, there, V, e).to(values.dtype)
            S = tl.load(states + at_cells, mask=inside, other=0.0).to(values.dtype)
            A = tl.load(adjoints + at_cells, mask=inside, other=0.0).to(values.dtype)
            wide = tl.dot(dh, S, wide, input_precision="ieee")
            other = tl.dot(values, A, other, input_precision="ieee")
        wide += of_norm[:, None] * tl.load(norms + number * K + a, mask=a < K, other=0.0)[None, :]
        other += tl.load(d_norms + number * K + a, mask=a < K, other=0.0)[None, :]
        query, keys = _block(q, shared, there, K, a), _block(k, shared, there, K, a)
        d_since += since * tl.sum(query.to(tl.float32) * wide, 1)
        d_until += until * tl.sum(keys.to(tl.float32) * other, 1)
        dq = tl.dot(d_scores.to(keys.dtype), keys, since[:, None] * wide, input_precision="ieee")
        dk = tl.dot(tl.trans(d_scores.to(query.dtype)), query, until[:, None] * other, input_precision="ieee")
        to, mask = steps[:, None] * K + a[None, :], there[:, None] & (a < K)[None, :]
        tl.store(d_q + to, dq, mask=mask)
        tl.store(d_k + to, dk, mask=mask)
    part = tl.arange(0, PARTS)
    totals = d_totals + part.to(tl.int64) * tl.num_programs(0) + number
    d_total = tl.sum(tl.load(totals, mask=part < parts, other=0.0), 0)
    earlier = tl.sum(tl.where(j < i, d_until[None, :], 0.0), 1)
    tl.store(d_log_f + steps, of_decay + tl.cumsum(d_since, 0, reverse=True) + earlier + d_total, mask=there)
    tl.store(d_log_i + steps, of_level + d_until, mask=there)
    if chunk == 0:
        tl.store(from_state + row * H + head, tl.sum(d_since, 0) + d_total)
    if chunk == tl.cdiv(T, C) - 1:
        tl.store(to_state + row * H + head, tl.sum(d_until, 0) + d_total)


@triton.jit
def _follows(a, b, c, d):
    """The map x -> a x + b, then x -> c x + d."""
    return a * c, b * c + d


@triton.jit
def _keeps(log_i, log_f, resets, m_all, first, row, t, head, mask, T, H):
    """Whether a step's m comes from the one before, by its forget gate; and whether no document starts at the step."""
    at = (row * T + t)[:, None] * H + head[None, :]
    m = tl.load(m_all + at - H, mask=mask & (t > 0)[:, None], other=0.0)
    m = tl.where((t == 0)[:, None], first[None, :], m)
    old = tl.full(m.shape, 1, tl.int1)
    if resets is not None:
        old = (tl.load(resets + row * T + t, mask=(t >= 0) & (t < T), other=0) == 0)[:, None] & old
        m = tl.where(old, m, 0.0)
    f, i = tl.load(log_f + at, mask=mask, other=0.0), tl.load(log_i + at, mask=mask, other=0.0)
    return f + m > i, old


@triton.jit
def _carries(
    log_i,
    log_f,
    resets,
    m_all,
    before,
    d_steps,
    from_state,
    to_state,
    d_m,
    d_log_i,
    d_log_f,
    T,
    H,
    C: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of m, from the last step back: it goes to the gate from which m came, and to the m before."""
    row = tl.program_id(1).to(tl.int64)
    head, time = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, C)
    own = row * H + head
    inside = head < H
    first = tl.load(before + own * tl.cdiv(T, C), mask=inside, other=0.0)
    x = tl.load(d_m + own, mask=inside, other=0.0) - tl.load(to_state + own, mask=inside, other=0.0)
    for start in range(0, T, C):
        t = T - 1 - start - time
        at, there = (row * T + t)[:, None] * H + head[None, :], (t >= 0)[:, None] & inside[None, :]
        later = there & (t < T - 1)[:, None]
        kept, old = _keeps(log_i, log_f, resets, m_all, first, row, t + 1, head, later, T, H)
        passes = tl.where(later, tl.where(kept & old, 1.0, 0.0), 1.0)
        total, y = tl.associative_scan((passes, tl.load(d_steps + at, mask=there, other=0.0)), 0, _follows)
        y += total * x[None, :]
        kept, _ = _keeps(log_i, log_f, resets, m_all, first, row, t, head, there, T, H)
        f, i = tl.load(d_log_f + at, mask=there, other=0.0), tl.load(d_log_i + at, mask=there, other=0.0)
        tl.store(d_log_f + at, f + tl.where(kept, y, 0.0), mask=there)
        tl.store(d_log_i + at, i + tl.where(kept, 0.0, y), mask=there)
        x = tl.sum(tl.where((time == C - 1)[:, None], y, 0.0), 0)
    zero = tl.zeros((1,), tl.int32)
    kept, old = _keeps(log_i, log_f, resets, m_all, first, row, zero, head, inside[None, :], T, H)
    x *= tl.sum(tl.where(kept & old, 1.0, 0.0), 0)
    tl.store(d_m + own, x + tl.load(from_state + own, mask=inside, other=0.0), mask=inside)


def _how(q: torch.Tensor, K: int, V: int) -> dict[str, int]:
    most, warps = (NARROW, 8) if q.dtype == torch.float32 else (WIDE, 4)
    return {"C": CHUNK, "KEYS": tile(K, most), "VALUES": tile(V, most), "num_warps": warps}


def _by_heads(H: int) -> dict[str, int]:
    return {"C": CHUNK, "HEADS": min(HEADS, triton.next_power_of_2(H)), "num_warps": 4}


def mlstm_forward(
    q, k, v, log_i, log_f, resets, C, n, m, h, m_all, norm, states, norms, before, B, T, G, R, K, V, scale, eps
) -> None:
    H, chunks = G * R, triton.cdiv(T, CHUNK)
    if states is None:
        states, norms, before = (C.new_empty(B, H, chunks, *x.shape[2:]) for x in (C, n, m))
    how, by_heads = _how(q, K, V), _by_heads(H)
    keys, values = triton.cdiv(K, how["KEYS"]), triton.cdiv(V, how["VALUES"])
    gates = log_i, log_f, resets
    _stabilisers[triton.cdiv(H, by_heads["HEADS"]), B](*gates, m, m_all, before, T, H, **by_heads)
    sizes = T, G, H, K, V
    _states[B * H, keys, values](k, v, *gates, m_all, before, C, n, states, norms, *sizes, **how)
    _outputs[B * H * chunks, values](q, k, v, *gates, m_all, before, states, norms, h, norm, *sizes, scale, eps, **how)


def mlstm_backward(
    q,
    k,
    v,
    log_i,
    log_f,
    resets,
    h,
    m_all,
    norm,
    states,
    norms,
    before,
    d_h,
    d_C,
    d_n,
    d_m,
    d_q,
    d_k,
    d_v,
    d_log_i,
    d_log_f,
    B,
    T,
    G,
    R,
    K,
    V,
    scale,
    eps,
) -> None:
    H, chunks = G * R, triton.cdiv(T, CHUNK)
    how, by_heads = _how(q, K, V), _by_heads(H)
    keys, values = triton.cdiv(K, how["KEYS"]), triton.cdiv(V, how["VALUES"])
    factors, d_norm, d_steps = (torch.empty_like(norm) for _ in range(3))
    count = B * T * H
    _divisors[(triton.cdiv(count, ROWS),)](
        h, norm, m_all, d_h, factors, d_norm, d_steps, count, V, eps, ROWS=ROWS, VALUES=how["VALUES"], num_warps=4
    )
    adjoints, d_norms = torch.empty_like(states), torch.empty_like(norms)
    parts = keys * values
    d_totals = norm.new_empty(parts, B, H, chunks)
    ends = norm.new_empty(2, B, H)
    gates = log_i, log_f, resets, m_all, before
    sizes = T, G, H, K, V, scale
    _adjoints[B * H, keys, values](
        q, *gates, states, norms, d_h, factors, d_norm, d_C, d_n, adjoints, d_norms, d_totals, *sizes, **how
    )
    _values[B * H * chunks, values](q, k, *gates, d_h, factors, adjoints, d_v, *sizes, **how)
    of_q, of_k = (d_q, d_k) if R == 1 else q.new_empty(2, B, T, G, R, K, dtype=torch.float32)
    writes = of_q, of_k, d_log_i, d_log_f, *ends
    theirs = d_h, factors, d_norm, adjoints, d_norms, d_totals
    _keys[(B * H * chunks,)](
        q, k, v, *gates, states, norms, *theirs, *writes, parts, *sizes, **how, PARTS=triton.next_power_of_2(parts)
    )
    if R > 1:
        d_q.copy_(of_q.sum(3))
        d_k.copy_(of_k.sum(3))
    grid = triton.cdiv(H, by_heads["HEADS"]), B
    _carries[grid](*gates, d_steps, *ends, d_m, d_log_i, d_log_f, T, H, **by_heads)
