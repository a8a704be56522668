"""What the layers around the delta rule share: projections and convolution before it, norm and output after it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers.parts import CausalConv, conv_backend, init_projections, main_backend, precise, project, whole
from zoo.norms import GatedRMSNorm
from zoo.ops import delta_rule, dplr
from zoo.ops.cells import HeadsCell, heads_cell_step
from zoo.ops.modules import bare
from zoo.ops.single_step import STEPPING
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, recurrent_dtype, single


class DeltaState(NamedTuple):
    conv: Tensor  # (B, W - 1, channels of q, k and v): the last inputs of the convolution
    memory: Tensor  # (B, H, K, V)


class DeltaMixer(Mixer):
    """A layer of H heads, each with a memory (K, V) that the delta rule writes, behind one convolution over q, k and v.

    A word's `__init__` sets the sizes, then calls `make_front`, makes what is its own, and calls `make_back`; its
    `forward` goes through `front`, its own decays, `write` and `back`.

    Attributes:
        n_key_heads: G, heads of q and k; a divisor of H.
        n_heads: H.
        d_key: K.
        d_value: V.
        qkv_parts: widths of q, k and v.
        parts: widths of all that the input projection gives: q, k and v in one, beta, and what a word adds.
        n_writes: steps of the delta rule a token.
    """

    traits = Traits(cuts_in_ops=True)
    n_key_heads: int
    n_heads: int
    d_key: int
    d_value: int
    qkv_parts: list[int]
    parts: list[int]
    n_writes: int = 1
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    cell: HeadsCell | None = None  # how a single step is computed in one call, where the word can be

    def make_front(
        self,
        qkv_parts: list[int],
        others: list[int],
        activation: Literal["silu"] | None = "silu",
        betas: int | None = None,
    ) -> None:
        """Make the projection of x to q, k, v, beta and `others`, and the convolution over q, k and v.

        `betas` is the width of beta, by default one for each write of each head.
        """
        c = self.config
        self.qkv_parts, self.activation = qkv_parts, activation
        self.beta_range = 2 if getattr(c, "allow_neg_eigval", False) else 1
        self.parts = [sum(qkv_parts), betas or self.n_writes * self.n_heads, *others]
        self.in_proj = nn.Linear(self.d_model, sum(self.parts), bias=False)
        self.conv = None
        if c.conv_size:
            self.conv = CausalConv(
                self.parts[0], c.conv_size, bias=c.conv_bias, activation=activation, backend=conv_backend(c.backend)
            )

    def make_back(self, place: Place, eps: float = 1e-5) -> None:
        """Make the norm of each head and the output projection, and give both projections their first weights."""
        self.norm = GatedRMSNorm(self.d_value, eps=eps)
        self.out_proj = nn.Linear(self.n_heads * self.d_value, self.d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)

    def init_up(self, *layers: nn.Linear) -> None:
        """Give the second halves of projections in two their first weights, and no bias."""
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def make_cell(self, others: dict[str, int]) -> None:
        """Let single steps run in one call: q, k, v with silu, l2 norms of q and k, and the norm with its silu gate.

        `others` are the places "dt_at" and "gate_at" in a row, of those that it has.
        """
        keys, c = self.n_key_heads * self.d_key, self.config
        self.cell = HeadsCell(
            width=sum(self.parts),
            conv_at=0,
            channels=self.parts[0],
            conv_size=c.conv_size,
            silu=True,
            q_at=0,
            k_at=keys,
            v_at=2 * keys,
            beta_at=self.parts[0],
            **{"dt_at": -1, "gate_at": -1, **others},
            n_key_heads=self.n_key_heads,
            n_heads=self.n_heads,
            d_key=self.d_key,
            d_value=self.d_value,
            v_times_dt=False,
            n_parts=0,
            gate_first=False,
            q_norm=1e-6,
            beta_range=self.beta_range,
            scale=self.d_key**-0.5,
            norm_eps=self.norm.eps,
        )

    def one_step(self, x: Tensor, state: State | None, context: Context | None) -> tuple[Tensor | None, Tensor | None]:
        """What the heads give at a single step, normed and gated, (B, 1, H V), where one call computes it.

        Otherwise None, and second what `in_proj` gave of x, or None where it was not called.
        """
        if self.cell is None or not single(x, state, context) or self.config.backend not in STEPPING:
            return None, None
        conv = self.conv
        if not bare(self.norm, cls=GatedRMSNorm) or not (conv is None or bare(conv, cls=CausalConv)):
            return None, None
        rows = self.in_proj(x)
        weight, bias = (None, None) if conv is None else (conv.weight, conv.bias)
        A_log, dt_bias = (self.A_log, self.dt_bias) if self.cell.dt_at >= 0 else (None, None)
        ops = ("delta_rule",) if conv is None else ("causal_conv1d", "delta_rule")
        scales = weight, bias, A_log, dt_bias, None, self.norm.weight
        o = heads_cell_step(self.cell, rows, *scales, cast(DeltaState, state), ops)
        return o, rows

    def front(
        self, x: Tensor, state: State | None, context: Context | None, rows: Tensor | None = None
    ) -> tuple[list[Tensor], DeltaState]:
        """[q, k, v, beta, *others], each (B, T, its width), and the state with the convolution's next one in it.

        beta has its sigmoid; q, k and v their activation, if `activation` says so. `rows` are what `in_proj` gave of x,
        where that is known.
        """
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        projected = project(x, self.in_proj, self.parts) if rows is None else rows.split(self.parts, -1)
        qkv, beta, *others = projected
        if self.conv:
            qkv, conv = self.conv(qkv, state.conv, context)
        else:
            qkv, conv = F.silu(qkv) if self.activation else qkv, state.conv
        beta = precise(beta).sigmoid() * self.beta_range
        return [*qkv.split(self.qkv_parts, -1), beta, *others], DeltaState(conv, state.memory)

    def write(self, q, k, v, beta, log_decay, state: DeltaState, packing: dict[str, Any]) -> tuple[Tensor, DeltaState]:
        """The delta rule over all steps, arguments as in `zoo.ops`: what q reads (B, T, H, V), and the next state."""
        backend = main_backend(self.config.backend)
        o, memory = delta_rule(q, k, v, beta, log_decay, state.memory, backend=backend, in_place=True, **packing)
        return o, DeltaState(state.conv, memory)

    def write_dplr(
        self, q, k, v, a, log_decay, state: DeltaState, packing: dict[str, Any]
    ) -> tuple[Tensor, DeltaState]:
        """As `write`, where the key that is read is not the key that is written: a step adds k (a^T S), see `dplr`."""
        backend = main_backend(self.config.backend)
        b = k.repeat_interleave(self.n_heads // k.shape[2], 2)
        o, memory = dplr(q, k, v, a, b, log_decay, state.memory, backend=backend, in_place=True, **packing)
        return o, DeltaState(state.conv, memory)

    def back(self, o: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """o (B, T, H, V), normed head by head, times silu(gate) (B, T, H V) if there is one, projected to (B, T, D)."""
        o = self.norm(o, None if gate is None else gate.unflatten(-1, (self.n_heads, -1)))
        return self.out_proj(o.flatten(-2).to(dtype))

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> DeltaState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return DeltaState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = (batch_size, max(self.config.conv_size - 1, 0), sum(self.qkv_parts))
        return conv, (batch_size, self.n_heads, self.d_key, self.d_value)

    def flops_per_token(self, context_length: int) -> int:
        projections = self.d_model * (sum(self.parts) + self.n_heads * self.d_value)
        recall_and_read = 2 * self.n_writes * self.n_heads * self.d_key * self.d_value  # of k, and with q
        return 2 * projections + 2 * recall_and_read


def head_sizes(mixer: str, config: Any, width: float, head_width: int) -> tuple[int, int, int, int]:
    """G, K, H, V from the options n_heads, head_dim, n_v_heads and expand_v.

    By default the heads of q and k are about `head_width` wide and `width` together.
    """
    groups = config.n_heads or max(1, round(width / head_width))
    d_key = config.head_dim or max(1, round(width / groups))
    heads = config.n_v_heads or groups
    if heads % groups:
        raise UsageError(f"{mixer}: n_v_heads={heads} is no multiple of n_heads={groups}.")
    d_value = whole(mixer, f"expand_v * head_dim = {config.expand_v:g} * {d_key}", config.expand_v * d_key)
    return groups, d_key, heads, d_value
