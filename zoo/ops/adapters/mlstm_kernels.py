"""mlstm_kernels (NX-AI): the matrix LSTM in Triton, laid out (B, H, T, D).

Its backward pass takes the normaliser for a constant, as a norm follows in xLSTM: the gradients of q, k and the gates
are not those of the op. So it serves passes without gradients, and those only by name: a model would otherwise be
evaluated by other kernels than it was trained with. It multiplies float32 in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.adapters import missing, off_device
from zoo.ops.common import Heads

CHUNK = 64
MODULE = "mlstm_kernels.torch.chunkwise.triton_xl_chunk"
OPEN = -1e-11  # the largest log forget gate that it gets: its own is the logarithm of a sigmoid, which is below 0
SHUT = -1e4  # a log input gate of padding


def why_not(x: Tensor, heads: Heads, *, chosen: bool, learns: bool) -> str | None:
    """Why it cannot take these heads; x is an input as the caller gave it.

    Args:
        chosen: the form was chosen by name, so TF32 and forget gates of at most 1 are allowed.
        learns: a gradient of the inputs is recorded.
    """
    if (why := off_device(x) or missing("mlstm_kernels", MODULE, "mlstm_kernels") or outdated()) is not None:
        return why
    if learns:
        return "its gradients take the normaliser for a constant; call it without gradients"
    if heads.resets is not None:
        return "it knows no documents"
    if x.dtype == torch.float64:
        return "it computes in float32 at most, the inputs are torch.float64"
    if not chosen:
        return "it has no gradients and its forget gates are at most 1; ask for it by name"
    return None


def outdated() -> str | None:
    """Why this version of Triton cannot compile its kernels."""
    import triton
    from triton.language.semantic import TritonSemantic

    if hasattr(TritonSemantic, "make_block_ptr"):
        return None
    return f"its kernels use block pointers, which triton {triton.__version__} has no more"


def mlstm(
    heads: Heads,
    log_i: Tensor,
    log_f: Tensor,
    n: Tensor,
    m: Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype,
    kernel: Callable[..., Any] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The op of that name on prepared heads and gates, operands in `dtype`: h (B, T, G, R, V) and the last C, n, m.

    Args:
        log_i, log_f: (B, T, G, R), of padding -inf and 0; a forget gate above 1 counts as 1.
        kernel: the library's own by default.
    """
    if kernel is None:
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

        kernel = mlstm_chunkwise__xl_chunk
    shape, T, K = heads.v.shape, heads.v.shape[1], heads.k.shape[-1]
    missing_steps = -T % CHUNK

    def row(x: Tensor, padding: float = 0.0) -> Tensor:
        """(B, T, H, D) or (B, T, H) -> (B, H, T, ...), T a multiple of the chunk."""
        x = x.transpose(1, 2)
        after = (0, missing_steps) if x.ndim == 3 else (0, 0, 0, missing_steps)
        return F.pad(x, after, value=padding).contiguous()

    q, k = (x.unsqueeze(3).expand(*shape[:4], K).flatten(2, 3) for x in (heads.q * (scale * K**0.5), heads.k))
    open_or_less = log_f.clamp(max=OPEN)
    logits = open_or_less - (-torch.expm1(open_or_less)).log()  # whose log sigmoid it is
    h, (last_C, last_n, last_m) = kernel(
        q=row(q).to(dtype),
        k=row(k).to(dtype),
        v=row(heads.v.flatten(2, 3)).to(dtype),
        i=row(log_i.flatten(2, 3).clamp(min=SHUT), SHUT),
        f=row(logits.flatten(2, 3), 25.0),
        c_initial=heads.state.flatten(1, 2).contiguous(),
        n_initial=n.flatten(1, 2).contiguous(),
        m_initial=m.flatten(1, 2).unsqueeze(-1).contiguous(),
        return_last_states=True,
        eps=eps,
        chunk_size=CHUNK,
        autocast_kernel_dtype=dtype,
    )
    by_group = shape[2:4]
    last = last_C.unflatten(1, by_group), last_n.unflatten(1, by_group), last_m.flatten(1).unflatten(1, by_group)
    return h[:, :, :T].transpose(1, 2).reshape(shape).float(), tuple(x.float() for x in last)  # type: ignore[return-value]
