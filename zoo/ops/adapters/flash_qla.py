"""flash-qla (FlashQLA, Qwen): the gated delta rule in TileLang, for GPUs of compute capability 9.0 and above.

Its layout is ours, (B, T, H, K), and groups share keys as ours do. Packed documents are sequences of one long row, as
in flash-linear-attention, which calls it by itself where both are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops.adapters import missing
from zoo.ops.adapters.flash_linear_attention import Rows
from zoo.ops.common import Heads

WIDTH = 128
DTYPES = (torch.bfloat16, torch.float16)


def why_not(x: Tensor, heads: Heads) -> str | None:
    """Why it cannot take these heads; x is an input as the caller gave it."""
    if x.device.type != "cuda":  # TileLang: no interpreter
        return f"it needs a GPU, the inputs are on {x.device}"
    if torch.compiler.is_compiling():
        return "torch.compile takes the plain forms"
    if x.dtype not in DTYPES:
        return f"it computes in bfloat16 or float16, the inputs are {x.dtype}"
    if heads.k.shape[-1] != WIDTH or heads.v.shape[-1] != WIDTH:
        return f"its keys and values are {WIDTH} wide, these {heads.k.shape[-1]} and {heads.v.shape[-1]}"
    if heads.g is not None and heads.g.shape[-1] > 1:
        return "it has one decay a head, these are per channel"
    if torch.cuda.get_device_capability(x.device)[0] < 9:
        return "it needs a GPU of compute capability 9.0 or above"
    return missing("flash_qla", "flash_qla", "flash-qla")


def delta_rule(
    heads: Heads, scale: float, dtype: torch.dtype, kernel: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The op of that name on prepared heads, operands in `dtype`: o (B, T, G, R, V), state (B, G, R, K, V).

    `kernel` is the library's own by default.
    """
    if kernel is None:
        from flash_qla import chunk_gated_delta_rule

        kernel = chunk_gated_delta_rule
    assert heads.beta is not None
    rows = Rows.of(heads, dtype, shared=True)
    beta = rows.pack(heads.beta).squeeze(-1)
    g = torch.zeros_like(beta) if heads.g is None else rows.pack(heads.g).squeeze(-1)
    o, state = kernel(q=rows.q, k=rows.k, v=rows.v, g=g, beta=beta.to(dtype), scale=scale, **rows.rest)
    return rows.unpack(o, state)
