"""ggml's operators for recurrences, called on torch tensors where they lie.

In ggml the first axis is the innermost one, so that a tensor (B, T, H, K) here has ne = (K, H, T, B) there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MEMORY = 1 << 20  # bytes for the graph; tensors keep their own memory


def gated_linear_attention(threads: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Callable[[], Tensor]:
    """A function that runs `gated_linear_attn`, with a decay a channel, on (B, T, H, K) once: o (B, T, H, K).

    Raises:
        ImportError: ggml-python is not installed. So do all functions below.
    """
    import ggml

    B, _, H, K = q.shape
    tensors = [_tokens(x) for x in (k, v, q, log_decay.exp())]
    node = lambda c, *x: ggml.ggml_gated_linear_attn(c, *x, K**-0.5)  # noqa: E731
    return _graph(threads, node, [*tensors, torch.zeros(B, H * K * K)], q.shape)


def wkv7(
    threads: int, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor
) -> Callable[[], Tensor]:
    """`rwkv_wkv7`, likewise, for heads of 64. Not scaled."""
    import ggml

    B, _, H, K = q.shape
    tensors = [_tokens(x) for x in (q, log_decay.exp(), k, v, a, b)]
    return _graph(threads, ggml.ggml_rwkv_wkv7, [*tensors, torch.zeros(B, H * K * K)], q.shape)


def gated_delta_net(
    threads: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor
) -> Callable[[], Tensor]:
    """`gated_delta_net`, with a decay a head (B, T, H) or a channel (B, T, H, K)."""
    import ggml

    B, _, H, K = q.shape
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    node = lambda c, *x: ggml.ggml_gated_delta_net(c, *x, 1)  # noqa: E731
    return _graph(threads, node, [q, k, v, decay, beta[..., None], torch.zeros(B, H, K, K)], q.shape)


def ssm_scan(threads: int, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Callable[[], Tensor]:
    """`ssm_scan` of Mamba: u, delta (B, T, D), A (D, N), B and C (B, T, N); delta before its softplus."""
    import ggml

    rows, _, D = u.shape
    state, row = torch.zeros(rows, D, 1, A.shape[1]), torch.arange(rows, dtype=torch.int32)
    tensors = [state, u[..., None], delta, A, B[:, :, None], C[:, :, None], row]
    return _graph(threads, ggml.ggml_ssm_scan, tensors, u.shape)


def ssm_conv(threads: int, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """`ssm_conv` of x (B, T, D), which is turned to (B, D, W - 1 + T) before: o (B, T, D)."""
    import ggml

    padded = torch.nn.functional.pad(x.mT, (weight.shape[1] - 1, 0)).contiguous()
    return _graph(threads, ggml.ggml_ssm_conv, [padded, weight], x.shape)


def _tokens(x: Tensor) -> Tensor:
    """(B, T, H, K) as (B T, H, K): the rows of a batch follow each other."""
    return x.flatten(0, 1)


def _graph(
    threads: int, node: Callable[..., Any], tensors: Sequence[Tensor], shape: Sequence[int]
) -> Callable[[], Tensor]:
    """A function that computes one node from the tensors, and gives the first numbers of its output in `shape`."""
    import ggml

    context = ggml.ggml_init(ggml.ggml_init_params(mem_size=MEMORY, mem_buffer=None, no_alloc=True))
    kept = [x.contiguous() for x in tensors]
    inputs = []
    for x in kept:
        kind = ggml.GGML_TYPE_I32 if x.dtype == torch.int32 else ggml.GGML_TYPE_F32
        sizes = (ctypes.c_int64 * x.ndim)(*reversed(x.shape))
        inputs.append(ggml.ggml_new_tensor(context, kind, x.ndim, sizes))
        inputs[-1].contents.data = x.data_ptr()
    result = node(context, *inputs)
    out = torch.zeros(ggml.ggml_nelements(result))
    result.contents.data = out.data_ptr()
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, result)
    plan = ggml.ggml_graph_plan(graph, threads, None)
    work = ctypes.create_string_buffer(max(int(plan.work_size), 1))
    plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))
    n = torch.Size(shape).numel()

    def run() -> Tensor:
        status = ggml.ggml_graph_compute(graph, ctypes.byref(plan))
        assert status == ggml.GGML_STATUS_SUCCESS
        return out[:n].view(*shape)

    run.memory = kept, work, context  # type: ignore[attr-defined]  # which the graph points to
    return run
