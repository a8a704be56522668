"""What the attention words share: rotary positions, norms of queries and keys, and looking ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.ops import RopeScaling, rotary_table, rotate
from zoo.ops.single_step import rotate_step
from zoo.protocol import Context, Mixer, State, derive_heads
from zoo.states import document_positions


class RopeOptions(Options):
    """Rotary positions.

    Attributes:
        rope: rotary positions; the next options belong to them. Without them only the causal mask shows the order, and
            the key that all heads of `mla` share is an ordinary key (Kimi Linear).
        rope_base: the slowest rotation takes about 2 pi base steps.
        rope_interleaved: rotate neighbouring channels (the paper) or the two halves of a head (Llama, NeoX): the same
            model with its channels in another order, so this matters only for given weights.
        rope_scaling: how a model is taken to longer contexts, see `zoo.ops.rotary.RopeScaling`; what follows belongs
            to it.
        rope_factor: how much longer (with "ntk", the factor that the slowest rotation is slowed by).
        rope_context: the length trained on (yarn, llama3).
        rope_bands: turns within that length below which a rotation is slowed down in full, and above which not at all;
            by default 1 and 32 (yarn), 1 and 4 (llama3).
        rope_truncate: yarn widens the stretch between to whole channel pairs.
        rope_amplitude: factor on cosines and sines; by default 0.1 ln(rope_factor) + 1 for yarn (DeepSeek: 1).
    """

    rope: bool = True
    rope_base: float = Field(default=10000.0, gt=0)
    rope_interleaved: bool = True
    rope_scaling: Literal["linear", "ntk", "yarn", "llama3"] | None = None
    rope_factor: float = Field(default=8.0, ge=1)
    rope_context: int = Field(default=8192, ge=1)
    rope_bands: tuple[float, float] | None = None
    rope_truncate: bool = True
    rope_amplitude: float | None = Field(default=None, gt=0)

    def scaling(self, mixer: str) -> RopeScaling | None:
        """The options from `rope_scaling` on as one value; all of those about positions are checked."""
        about = ("rope_", "index_rope_")
        stray = [k for k in self.changed() if k.startswith(about) and k != "rope_dim"]  # a width of the key alone
        if stray and not self.rope:
            raise UsageError(f"{mixer}: {stray[0]} belongs to rope, which is not set.")
        low, high = self.rope_bands or (1.0, 2.0)
        apart = low <= high if self.rope_scaling == "yarn" else low < high  # yarn's blend is a pair wide at least
        if not (low > 0 and apart and high < math.inf):
            wanted = "0 < low <= high" if self.rope_scaling == "yarn" else "0 < low < high"
            raise UsageError(
                f"{mixer}: rope_bands=[{low:g}, {high:g}] is not allowed: it should be [low, high], {wanted}."
            )
        if self.rope_scaling is None:
            stray = [k for k in self.changed() if k in SCALING_OPTIONS]
            if stray:
                raise UsageError(f"{mixer}: {stray[0]} belongs to rope_scaling, which is not set.")
            return None
        return RopeScaling(
            self.rope_scaling,
            self.rope_factor,
            self.rope_context,
            self.rope_bands,
            self.rope_truncate,
            self.rope_amplitude,
        )


SCALING_OPTIONS = ("rope_factor", "rope_context", "rope_bands", "rope_truncate", "rope_amplitude")


def count_heads(
    mixer: str, d_model: int, n_heads: int | None, n_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """H and G, heads of queries and of keys: by default the fewest that fit d_model, in equal groups of G.

    Raises:
        UsageError: G does not divide H, or, where `head_dim` is not given, H does not divide d_model.
    """
    groups = n_kv_heads or 1
    fewest = max(1, d_model // head_dim) if head_dim else derive_heads(d_model)
    fits = (n for n in range(groups, d_model + 1, groups) if n >= fewest and (head_dim or d_model % n == 0))
    H = n_heads or next(fits, groups)
    G = n_kv_heads or H
    if H % G:
        raise UsageError(f"{mixer}: n_heads={H} is not divisible by n_kv_heads={G}.")
    if head_dim is None and d_model % H:
        raise UsageError(
            f"{mixer}: d_model={d_model} is not divisible by n_heads={H}: take another number, or set head_dim."
        )
    return H, G


def angles(
    x: Tensor, length: Tensor | None, context: Context, width: int, base: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, T, width / 2) of the T new steps of x, each at its position in its document.

    Args:
        length: (B,) steps of the current document before these; None for none.
    """
    if context.pieces is not None:
        length = context.pieces.positions(len(x), context.resets, x.device)
    if length is not None:
        return rotary_table(document_positions(length, x.shape[1], context.resets), width, base=base, scaling=scaling)
    cos, sin = rotary_table(torch.arange(x.shape[1], device=x.device)[None], width, base=base, scaling=scaling)
    if context.resets is None:
        return cos, sin
    start = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    positions = document_positions(start, x.shape[1], context.resets)
    return cos[0, positions], sin[0, positions]


def turn(
    xs: Sequence[Tensor],
    length: Tensor | None,
    context: Context,
    width: int,
    base: float,
    scaling: RopeScaling | None,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """Each of xs (B, T, heads, K) rotated to its positions, arguments as of `angles` and `rotate`."""
    if length is not None and context.resets is context.pieces is None:
        done = [rotate_step(x, length, width, base, scaling, interleaved) for x in xs]
        if all(y is not None for y in done):
            return tuple(done)  # type: ignore[arg-type]
    cos, sin = angles(xs[0], length, context, width, base, scaling)
    return tuple(rotate(x, cos, sin, interleaved=interleaved) for x in xs)


class AttentionWord(Mixer):
    """A mixer that may look ahead, and then goes through whole sequences only."""

    def init_projections(self, init: Callable[[Tensor], Any]) -> None:
        for weight in self.parameters():
            if weight.ndim == 2:  # every matrix of attention is a projection, in an `nn.Linear` or not
                init(weight)

    def step(self, x_t: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise UsageError(f"{self.name} with causal=False looks ahead, so it cannot go step by step: use forward.")
        return super().step(x_t, state, context)
