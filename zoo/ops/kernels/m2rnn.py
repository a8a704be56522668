"""The RNN with matrix-valued states for GPUs: see `m2rnn.cpp`, whose functions, names and shapes these are.

A program runs one head of one row through all steps, in one launch, with its state and its weight in registers and
shared memory. Products are exact float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from zoo.ops.kernels.elementary import tanh
from zoo.ops.kernels.tiles import tile


@triton.jit
def _forward(
    q,
    k,
    v,
    weight,
    kept,
    written,
    resets,
    state,
    outputs,
    saved,
    T,
    G,
    H,
    K,
    V,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    group = head // (H // G)
    i, j, l = tl.arange(0, KEYS), tl.arange(0, VALUES), tl.arange(0, VALUES)
    cells, inside = i[:, None] * V + j[None, :], (i < K)[:, None] & (j < V)[None, :]
    square = (l < V)[:, None] & (j < V)[None, :]
    w = tl.load(weight + head * V * V + l[:, None] * V + j[None, :], mask=square, other=0.0)
    own = (row * H + head) * K * V
    h = tl.load(state + own + cells, mask=inside, other=0.0)
    for t in range(T):
        if saved is not None and t % CHUNK == 0:
            chunk = (row * tl.cdiv(T, CHUNK) + t // CHUNK) * H + head
            tl.store(saved + chunk * K * V + cells, h, mask=inside)
        if resets is not None:
            h = tl.where(tl.load(resets + row * T + t) != 0, 0.0, h)
        keys, gate = ((row * T + t) * G + group) * K, (row * T + t) * H + head
        key = tl.load(k + keys + i, mask=i < K, other=0.0)
        value = tl.load(v + gate * V + j, mask=j < V, other=0.0)
        new = tanh(tl.dot(h, w, key[:, None] * value[None, :], input_precision="ieee"))
        h = tl.load(kept + gate) * h + tl.load(written + gate) * new
        query = tl.load(q + keys + i, mask=i < K, other=0.0)
        tl.store(outputs + gate * V + j, tl.sum(query[:, None] * h, 0), mask=j < V)
    tl.store(state + own + cells, h, mask=inside)


@triton.jit
def _backward(
    q,
    k,
    v,
    weight,
    kept,
    written,
    resets,
    saved,
    d_outputs,
    d_state,
    d_q,
    d_k,
    d_v,
    d_weight,
    d_kept,
    d_written,
    befores,
    candidates,
    B,
    T,
    G,
    H,
    K,
    V,
    parts,
    limit,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CUT: tl.constexpr,
):
    """`befores` and `candidates` (programs, CHUNK, KEYS, VALUES) are the states inside a chunk, computed again."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, share = part // parts, H // G
    first = (part % parts) * tl.cdiv(share, parts)
    heads = tl.minimum(tl.cdiv(share, parts), share - first)
    i, j, l = tl.arange(0, KEYS), tl.arange(0, VALUES), tl.arange(0, VALUES)
    cells, inside = i[:, None] * V + j[None, :], (i < K)[:, None] & (j < V)[None, :]
    square = (l < V)[:, None] & (j < V)[None, :]
    whole = i[:, None] * VALUES + j[None, :]
    scratch = (row * tl.num_programs(0) + part) * CHUNK * KEYS * VALUES
    piece = (part % parts).to(tl.int64) * B * T * G * K
    for number in range(heads):
        head = group * share + first + number
        w = tl.load(weight + head * V * V + l[:, None] * V + j[None, :], mask=square, other=0.0)
        own = (row * H + head) * K * V
        g = tl.load(d_state + own + cells, mask=inside, other=0.0)
        dw = tl.zeros((VALUES, VALUES), tl.float32)
        for back in range(tl.cdiv(T, CHUNK)):
            start = (tl.cdiv(T, CHUNK) - 1 - back) * CHUNK
            count = tl.minimum(T - start, CHUNK)
            chunk = (row * tl.cdiv(T, CHUNK) + start // CHUNK) * H + head
            h = tl.load(saved + chunk * K * V + cells, mask=inside, other=0.0)
            for s in range(count):
                t = start + s
                if resets is not None:
                    h = tl.where(tl.load(resets + row * T + t) != 0, 0.0, h)
                gate = (row * T + t) * H + head
                key = tl.load(k + ((row * T + t) * G + group) * K + i, mask=i < K, other=0.0)
                value = tl.load(v + gate * V + j, mask=j < V, other=0.0)
                new = tanh(tl.dot(h, w, key[:, None] * value[None, :], input_precision="ieee"))
                tl.store(befores + scratch + s * KEYS * VALUES + whole, h)
                tl.store(candidates + scratch + s * KEYS * VALUES + whole, new)
                h = tl.load(kept + gate) * h + tl.load(written + gate) * new
            tl.debug_barrier()
            for s in range(count):
                t = start + count - 1 - s
                at = scratch + (count - 1 - s) * KEYS * VALUES + whole
                keys, gate = ((row * T + t) * G + group) * K, (row * T + t) * H + head
                before, new = tl.load(befores + at), tl.load(candidates + at)
                keep, write = tl.load(kept + gate), tl.load(written + gate)
                query = tl.load(q + keys + i, mask=i < K, other=0.0)
                key = tl.load(k + keys + i, mask=i < K, other=0.0)
                value = tl.load(v + gate * V + j, mask=j < V, other=0.0)
                dy = tl.load(d_outputs + gate * V + j, mask=j < V, other=0.0)
                h = keep * before + write * new
                g += query[:, None] * dy[None, :]
                if CUT:
                    g = tl.minimum(tl.maximum(g, -limit), limit)
                p = write * g * (1.0 - new * new)
                dq, dk = tl.sum(h * dy[None, :], 1), tl.sum(p * value[None, :], 1)
                if number > 0:  # of the heads before, which this program has written
                    dq += tl.load(d_q + piece + keys + i, mask=i < K, other=0.0)
                    dk += tl.load(d_k + piece + keys + i, mask=i < K, other=0.0)
                tl.store(d_q + piece + keys + i, dq, mask=i < K)
                tl.store(d_k + piece + keys + i, dk, mask=i < K)
                tl.store(d_v + gate * V + j, tl.sum(p * key[:, None], 0), mask=j < V)
                tl.store(d_kept + gate, tl.sum(tl.sum(g * before, 1), 0))
                tl.store(d_written + gate, tl.sum(tl.sum(g * new, 1), 0))
                dw = tl.dot(tl.trans(before), p, dw, input_precision="ieee")
                g = tl.dot(p, tl.trans(w), keep * g, input_precision="ieee")
                if resets is not None:
                    g = tl.where(tl.load(resets + row * T + t) != 0, 0.0, g)
            tl.debug_barrier()
        tl.store(d_state + own + cells, g, mask=inside)
        tl.store(d_weight + (row * H + head) * V * V + l[:, None] * V + j[None, :], dw, mask=square)


def _sizes(K: int, V: int, chunk: int) -> dict[str, int]:
    return {"CHUNK": chunk, "KEYS": tile(K), "VALUES": tile(V), "num_warps": 4 if max(K, V) <= 32 else 8}


def m2rnn_forward(q, k, v, weight, kept, written, resets, state, outputs, saved, B, T, G, H, K, V, chunk) -> None:
    tensors = q, k, v, weight, kept, written, resets, state, outputs, saved
    _forward[H, B](*tensors, T, G, H, K, V, **_sizes(K, V, chunk))


def m2rnn_backward(*arguments) -> None:
    *tensors, B, T, G, H, K, V, chunk, parts, limit = arguments
    q = tensors[0]
    states = torch.empty(2, B * G * parts, chunk, tile(K), tile(V), dtype=torch.float32, device=q.device)
    cut = {"CUT": not math.isinf(limit), **_sizes(K, V, chunk)}
    _backward[G * parts, B](*tensors, *states, B, T, G, H, K, V, parts, limit, **cut)
