"""flash-linear-attention (`fla`): Triton kernels of the recurrences over heads.

Its layout is ours, (B, T, H, K), and its recurrences are too; what differs is that keys are not shared by groups of
heads, that packed documents are sequences of one long row (`cu_seqlens`), and that float32 operands are multiplied in
TF32 on GPUs, so that "auto" takes it only where the operands came in lower precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.adapters import missing, off_device
from zoo.ops.common import Heads

MAX_KEY = 256


def why_not(x: Tensor, d_key: int, *, chosen: bool) -> str | None:
    """Why it cannot take x (an input as the caller gave it) and keys of width `d_key`.

    Args:
        chosen: the form was chosen by name, so TF32 is allowed.
    """
    if (why := off_device(x) or missing("fla", "fla.ops", "flash-linear-attention")) is not None:
        return why
    if d_key > MAX_KEY:
        return f"its keys are at most {MAX_KEY} wide, these {d_key}"
    if x.dtype == torch.float64:
        return "it computes in float32 at most, the inputs are torch.float64"
    if x.dtype == torch.float32 and not chosen:
        return "it multiplies float32 in TF32; ask for it by name"
    return None


def linear_attention(heads: Heads, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op of that name on prepared heads, operands in `dtype`: o (B, T, G, R, V), state (B, G, R, K, V)."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    rows, g = Rows.of(heads, dtype), heads.g
    if g is None or g.shape[-1] == 1:
        per_head = None if g is None else rows.pack(g).squeeze(-1)
        o, state = chunk_simple_gla(rows.q, rows.k, rows.v, g=per_head, scale=scale, **rows.rest)
    else:
        o, state = chunk_gla(rows.q, rows.k, rows.v, rows.pack(g), scale=scale, **rows.rest)
    return rows.unpack(o, state)


def delta_rule(heads: Heads, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op of that name on prepared heads, operands in `dtype`: o (B, T, G, R, V), state (B, G, R, K, V)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    assert heads.beta is not None
    rows, g = Rows.of(heads, dtype), heads.g
    beta = rows.pack(heads.beta).squeeze(-1).to(dtype)
    if g is None or g.shape[-1] == 1:  # the library's kernel without decay takes no float32
        per_head = torch.zeros_like(beta, dtype=torch.float32) if g is None else rows.pack(g).squeeze(-1)
        o, state = chunk_gated_delta_rule(rows.q, rows.k, rows.v, per_head, beta, scale=scale, **rows.rest)
    else:
        o, state = chunk_kda(rows.q, rows.k, rows.v, rows.pack(g), beta, scale=scale, **rows.rest)
    return rows.unpack(o, state)


def dplr(heads: Heads, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op of that name; a, b (B, T, G, R, K) as prepared heads."""
    from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule

    rows = Rows.of(heads, dtype)
    g = torch.zeros_like(a) if heads.g is None else heads.g.expand_as(a)
    parts = (rows.pack(x).to(dtype) for x in (a, b))
    o, state = chunk_dplr_delta_rule(rows.q, rows.k, rows.v, *parts, rows.pack(g), scale=scale, **rows.rest)
    return rows.unpack(o, state)


class Rows(NamedTuple):
    """Prepared heads as such libraries take them: documents as sequences of one row, q and k of every head its own."""

    q: Tensor  # (B, T, H, K), or (1, B * T, H, K) of documents; G for H where they are shared
    k: Tensor
    v: Tensor  # (.., .., H, V)
    rest: dict[str, Any]  # initial state, and where documents start
    shape: torch.Size  # that of heads.v
    resets: Tensor | None

    @classmethod
    def of(cls, heads: Heads, dtype: torch.dtype, *, shared: bool = False) -> Rows:
        B, T, _, R, _ = heads.v.shape
        rows = cls(heads.q, heads.k, heads.v, {}, heads.v.shape, heads.resets)
        copies = 1 if shared else R
        q, k = (rows.pack(x.unsqueeze(3).expand(-1, -1, -1, copies, -1)).to(dtype) for x in (heads.q, heads.k))
        rest: dict[str, Any] = {"initial_state": heads.state.flatten(1, 2), "output_final_state": True}
        if heads.resets is not None:
            row, start, first = _documents(heads.resets)
            ends = torch.cat([row * T + start, row.new_full((1,), B * T)])
            goes_on = (first & ~heads.resets[row, start])[:, None, None, None]
            state = torch.where(goes_on, rest["initial_state"][row], 0)
            rest |= {"initial_state": state, "cu_seqlens": ends}
        return rows._replace(q=q, k=k, v=rows.pack(heads.v).to(dtype), rest=rest)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, G, R, D) to (B, T, H, D), or (1, B * T, H, D) where there are documents."""
        x = x.flatten(2, 3)
        return (x if self.resets is None else x.flatten(0, 1).unsqueeze(0)).contiguous()

    def unpack(self, o: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, G, R, V) and the last state of every row, (B, G, R, K, V)."""
        if self.resets is not None:
            first = _documents(self.resets)[2]
            state = state[first.roll(-1)]  # the document before a row's first one is the last of the row before
        return o.reshape(self.shape).float(), state.unflatten(1, self.shape[2:4]).float()


def _documents(resets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and first step of every document, rows in order, and whether it is the first of its row; each (n,)."""
    starts = resets.clone()
    starts[:, 0] = True
    row, start = starts.nonzero(as_tuple=True)
    return row, start, start == 0
