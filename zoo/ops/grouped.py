"""Grouped matrix products: rows sorted by group, each group times its own matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.derivatives import batched, gradients_of, once

ALIGNMENT = 16  # bytes, of the rows that `F.grouped_mm` takes


def grouped_feed_forward(
    x: Tensor,
    sizes: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y_i = W2_g act(W1_g x_i + b1_g) + b2_g for the rows i of group g.

    Args:
        x: (N, D), sorted by group.
        sizes: (E,) int64, rows of each group, N at most in all; what the rows left over give is finite, no more.
        up: (E, d_up, D).
        down: (E, D, d_hidden).
        activation: (n, d_up) to (n, d_hidden).
        up_bias: (E, d_up).
        down_bias: (E, D).
    """
    values_are_known = not torch.compiler.is_compiling() and not batched()
    if x.device.type == "cpu" and values_are_known:  # one group at a time stays in the cache
        counts = sizes.tolist()
        groups = [g for g, count in enumerate(counts) if count] or [0]  # x and the weights always get a gradient
        left_over = len(x) - sum(counts)
        parts = x.split([*(counts[g] for g in groups), left_over])[:-1]
        each = (_each(weights, groups) for weights in (up, up_bias, down, down_bias))
        outputs = [
            F.linear(activation(F.linear(rows, w1, b1)), w2, b2)
            for rows, w1, b1, w2, b2 in zip(parts, *each, strict=True)
        ]
        return torch.cat([*outputs, x.new_zeros(left_over, down.shape[1], dtype=outputs[0].dtype)])
    group = _group(x, sizes).clamp(max=len(sizes) - 1)
    h = grouped_linear(x, up, sizes)
    h = activation(h if up_bias is None else h + up_bias.to(h.dtype).index_select(0, group))
    y = grouped_linear(h, down, sizes)
    return y if down_bias is None else y + down_bias.to(y.dtype).index_select(0, group)


def _each(weights: Tensor | None, groups: list[int]) -> Sequence[Any]:
    """What belongs to each group."""
    if weights is None:
        return [None] * len(groups)
    # Gradients of one unbinding are written once; those of single indices would each be as large as all together.
    parts = weights.unbind() if torch.is_grad_enabled() else weights
    return [parts[g] for g in groups]


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """y_i = W_g x_i for the rows i of group g; one product a group, none for the rows of another.

    Args:
        x: (N, d_in), sorted by group.
        weight: (E, d_out, d_in).
        sizes: (E,) int64, rows of each group, N at most in all; the rows that are left over give zeros.

    Returns:
        (N, d_out), under autocast in its dtype.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if batched():
        return _every_product(x, weight, sizes)
    if device == "cuda" and x.dtype == torch.bfloat16 and len(x) and _aligned(x, weight):
        return _one_kernel(x, weight, sizes)
    if torch.compiler.is_compiling():  # sizes that depend on data would break the graph: they stay inside an operator
        return grouped_product(x, weight, sizes)
    return _products(x, weight, sizes)


def _products(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    counts = sizes.tolist()
    left_over = len(x) - sum(counts)
    parts = x.split([*counts, left_over])
    pairs = list(zip(parts[:-1], weight.unbind(), strict=True))
    outputs = [F.linear(part, w) for part, w in [pair for pair in pairs if len(pair[0])] or pairs[:1]]
    return torch.cat([*outputs, x.new_zeros(left_over, weight.shape[1])])


def _every_product(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """All rows times all matrices, for vmap, in which no sizes can be read."""
    group = _group(x, sizes)
    chosen = group[:, None] == torch.arange(len(sizes), device=x.device)
    return torch.einsum("nd,eod,ne->no", x, weight, chosen.to(x.dtype))


def _group(x: Tensor, sizes: Tensor) -> Tensor:
    """(N,), the group of every row; E for those that are left over."""
    rows, ends = torch.arange(len(x), device=x.device), sizes.cumsum(0)
    return (rows[:, None] >= ends).sum(1) if batched() else torch.searchsorted(ends, rows, right=True)


def _aligned(x: Tensor, weight: Tensor) -> bool:
    return all(width * x.element_size() % ALIGNMENT == 0 for width in weight.shape[1:])


def _one_kernel(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """All groups in one launch, with no wait for their sizes; rows past the last group, and gradients, are masked."""
    ends = sizes.cumsum(0)
    past = (torch.arange(len(x), device=x.device) >= ends[-1])[:, None]
    y = F.grouped_mm(x.masked_fill(past, 0), weight.mT, offs=ends.to(torch.int32))
    return y.masked_fill(past, 0)


@torch.library.custom_op("zoo::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """`grouped_linear` as one operator."""
    return _products(x, weight, sizes)


@grouped_product.register_fake
def _(x, weight, sizes):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("zoo::grouped_product_backward", mutates_args=())
def grouped_product_backward(d_y: Tensor, x: Tensor, weight: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    counts = sizes.tolist()
    d_weight = torch.stack([a.mT @ b for a, b in zip(_groups(d_y, counts), _groups(x, counts), strict=True)])
    return _products(d_y, weight.mT, sizes), d_weight


def _groups(x: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    return x[: sum(counts)].split(counts)


@grouped_product_backward.register_fake
def _(d_y, x, weight, sizes):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


@once(lambda ctx, d_y: gradients_of(_products, ctx.saved_tensors, d_y))
def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
    return *grouped_product_backward(d_y, *ctx.saved_tensors), None


grouped_product.register_autograd(_backward, setup_context=_setup)
