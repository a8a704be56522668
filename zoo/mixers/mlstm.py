"""The matrix LSTM of the xLSTM, in both published blocks."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers._xlstm import HeadNorm, HeadwiseLinear, small_std, wang_std
from zoo.mixers.parts import CausalConv, conv_backend, project, whole
from zoo.ops import MLSTMState, mlstm
from zoo.ops.modules import widely
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register

ONLY = {"v1": ("expand", "multiple_of", "conv_size", "qkv_block"), "7b": ("qk_factor", "v_factor", "gate_cap")}
MAX_HEADS = 4  # of the first block


class MLSTMMixerState(NamedTuple):
    conv: Tensor  # (B, W - 1, d_inner): the last inputs of the convolution; (B, 0, d_inner) in the 7B block
    C: Tensor  # (B, H, K, V)
    n: Tensor  # (B, H, K)
    m: Tensor  # (B, H)


@register("mlstm")
class MLSTM(Mixer):
    """mLSTM: an LSTM with a matrix memory and exponential gates, as in `xlstm` 2.

    `block="v1"` (Beck et al. 2024, arXiv 2405.04517, eq. 19 to 27, figure 11):

        u, z = W_up x ;  a = silu(conv(u)) ;  q, k, v = W_q a, W_k a, W_v u ;  i, f = W_if (q, k, v)
        y = W_down ((norm(mlstm(q, k, v, i, f)) + skip * a) * silu(z))

    with W_q, W_k and W_v block-diagonal in blocks of 4. `block="7b"` (Beck et al. 2025, arXiv 2503.13427, section 3):

        q, k, v, o = W x ;  i, f = 15 tanh(W_if x / 15) ;  y = W_out (sigmoid(o) * norm(mlstm(q, k, v, i, f)))

    with q and k at half the width. In both, the norm is a layer norm of each head and

        C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T ;  n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
        h_t = C_t^T q_t / max(|n_t^T q_t|, 1), q scaled by K^-0.5

    | state                    | cost per token                                  | parallel form              |
    |--------------------------|-------------------------------------------------|----------------------------|
    | H K (V + 1) + conv       | v1: 12 D^2 + 8 D^2 / H; 7b: 8 D^2 + D^2 / H     | chunked matmuls, O(T) in all |

    Published inits: W_up, W_q, W_k, W_v small, W_down after Wang; W_if zero with biases 3 to 6 for f, near 0 (v1) or
    -10 (7b) for i. The v1 block needs no feed-forward layer; put one after the 7b block.

    Cannot overwrite the value stored under a key, nor track states such as parity: its gates do not read the state.
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            block: "v1" with up-projection and convolution, or "7b" without.
            n_heads: H; by default 4 (v1), or heads of at least 64 channels of v (7b).
            expand: d_inner / D (v1).
            multiple_of: d_inner is rounded up to a multiple of this (v1).
            conv_size: W, steps in the window of the convolution (v1).
            qkv_block: width of the blocks of W_q, W_k and W_v (v1).
            qk_factor: width of q and of k, over D (7b).
            v_factor: width of v, over D (7b).
            gate_cap: i and f stay within plus and minus this; None for no bound (7b).
            input_bias: initial bias of the input gate; None for the published one.
            norm_eps: epsilon of the heads' norm; None for the published one, 1e-5 (v1) or 1e-6 (7b).
            bias: biases of all projections; those of the gates always have one.
            backend: form of the ops.
        """

        block: Literal["v1", "7b"] = "v1"
        n_heads: int | None = Field(default=None, ge=1)
        expand: float = Field(default=2.0, gt=0)
        multiple_of: int = Field(default=64, ge=1)
        conv_size: int = Field(default=4, ge=1)
        qkv_block: int = Field(default=4, ge=1)
        qk_factor: float = Field(default=0.5, gt=0)
        v_factor: float = Field(default=1.0, gt=0)
        gate_cap: float | None = Field(default=15.0, gt=0)
        input_bias: float | None = None
        norm_eps: float | None = Field(default=None, gt=0)
        bias: bool = False
        backend: Literal["auto", "reference", "chunked", "compiled"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        other = next(block for block in ONLY if block != config.block)
        if wrong := [name for name in config.changed() if name in ONLY[other]]:
            raise UsageError(f"mlstm: {wrong[0]} is an option of block='{other}', not of block='{config.block}'.")
        layer = BlockV1 if config.block == "v1" else Block7B
        self.layer = layer(d_model, config, place)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> MLSTMMixerState:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return MLSTMMixerState(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        heads, (keys, values) = self.layer.n_heads, self.layer.widths
        memory = (batch_size, heads, keys // heads, values // heads)
        reach = self.config.conv_size - 1 if self.config.block == "v1" else 0
        return (batch_size, reach, values), memory, memory[:3], memory[:2]

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        return self.layer(x, state, context)

    def flops_per_token(self, context_length: int) -> int:
        keys, values = self.layer.widths
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1) - self.layer.n_taps
        return 2 * weights + 2 * keys * values // self.layer.n_heads  # the read C^T q; the outer product is no matmul

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"block": "7b", "n_heads": 2},
            {"n_heads": 3, "expand": 1.5, "multiple_of": 12, "conv_size": 3, "qkv_block": 6, "bias": True},
            {"block": "7b", "qk_factor": 1.0, "v_factor": 0.5, "gate_cap": None, "bias": True, "backend": "reference"},
            {"block": "7b", "gate_cap": 5.0, "input_bias": 0.5, "norm_eps": 1e-3, "backend": "chunked"},
        ]


class BlockV1(nn.Module):
    """Up-projection, convolution and skip around the cell; parameters named as in `xlstm.blocks.mlstm.layer`."""

    def __init__(self, d_model: int, c: MLSTM.Config, place: Place):
        super().__init__()
        width = math.ceil(c.expand * d_model / c.multiple_of) * c.multiple_of
        self.n_heads = c.n_heads or next(n for n in range(MAX_HEADS, 0, -1) if width % n == 0)
        self.widths, self.n_taps, self.backend = (width, width), width * c.conv_size, c.backend
        for option, size in (("n_heads", self.n_heads), ("qkv_block", c.qkv_block)):
            if width % size:
                raise UsageError(f"mlstm: {option}={size} does not divide the inner width, {width}.")
        std = small_std(d_model)
        self.proj_up = _linear(d_model, 2 * width, std, bias=c.bias)
        self.conv = CausalConv(width, c.conv_size, bias=True, activation="silu", backend=conv_backend(c.backend))
        self.q_proj, self.k_proj, self.v_proj = (
            HeadwiseLinear(width, width // c.qkv_block, bias=c.bias, std=std) for _ in range(3)
        )
        initial = 0.1 * torch.randn(self.n_heads) if c.input_bias is None else torch.tensor(c.input_bias)
        self.igate, self.fgate = _gates(3 * width, self.n_heads, initial)
        self.outnorm = HeadNorm(width, eps=c.norm_eps or 1e-5, weight="centred")
        self.learnable_skip = nn.Parameter(torch.ones(width))
        self.proj_down = _linear(width, d_model, wang_std(d_model, place.n_layers), bias=c.bias)

    def forward(self, x: Tensor, state: MLSTMMixerState, context: Context | None) -> tuple[Tensor, MLSTMMixerState]:
        width = self.widths[0]
        u, z = project(x, self.proj_up, [width, width])
        a, conv = self.conv(u, state.conv, context)
        q, k, v = self.q_proj(a), self.k_proj(a), self.v_proj(u)
        qkv = torch.cat([q, k, v], -1)
        i, f = (widely(gate, qkv) for gate in (self.igate, self.fgate))
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in (q, k, v))
        memory = MLSTMState(*state[1:])
        h, memory = mlstm(q, k, v, i, F.logsigmoid(f), memory, backend=self.backend, **packing(context))
        h = (self.outnorm(h) + self.learnable_skip * a) * F.silu(z)
        return self.proj_down(h.to(x.dtype)), MLSTMMixerState(conv, *memory)


class Block7B(nn.Module):
    """The cell between projections, with an output gate; parameters named as in `xlstm.xlstm_large.model`."""

    def __init__(self, d_model: int, c: MLSTM.Config, place: Place):
        super().__init__()
        keys = whole("mlstm", f"qk_factor * d_model = {c.qk_factor:g} * {d_model}", c.qk_factor * d_model)
        values = whole("mlstm", f"v_factor * d_model = {c.v_factor:g} * {d_model}", c.v_factor * d_model)
        fits = (n for n in range(max(1, values // 64), 0, -1) if math.gcd(keys, values) % n == 0)
        self.n_heads = c.n_heads or next(fits)
        if math.gcd(keys, values) % self.n_heads:
            raise UsageError(
                f"mlstm: n_heads={self.n_heads} does not divide the widths of k and v, {keys} and {values}."
            )
        self.widths, self.n_taps, self.cap, self.backend = (keys, values), 0, c.gate_cap, c.backend
        self.q, self.k, self.v = (
            _linear(d_model, width, small_std(d_model), bias=c.bias) for width in (keys, keys, values)
        )
        self.ogate_preact = _linear(d_model, values, 0.0, bias=c.bias)
        initial = torch.tensor(-10.0 if c.input_bias is None else c.input_bias)
        self.igate_preact, self.fgate_preact = _gates(d_model, self.n_heads, initial)
        self.multihead_norm = HeadNorm(values, eps=c.norm_eps or 1e-6, weight="one", bias=c.bias)
        self.out_proj = _linear(values, d_model, wang_std(d_model, place.n_layers), bias=c.bias)

    def forward(self, x: Tensor, state: MLSTMMixerState, context: Context | None) -> tuple[Tensor, MLSTMMixerState]:
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)) for part in (self.q, self.k, self.v))
        i, f = (widely(gate, x) for gate in (self.igate_preact, self.fgate_preact))
        if self.cap is not None:
            i, f = (self.cap * torch.tanh(gate / self.cap) for gate in (i, f))
        memory = MLSTMState(*state[1:])
        h, memory = mlstm(q, k, v, i, F.logsigmoid(f), memory, backend=self.backend, **packing(context))
        h = self.ogate_preact(x).sigmoid() * self.multihead_norm(h)
        return self.out_proj(h.to(x.dtype)), MLSTMMixerState(state.conv, *memory)


def _linear(n_in: int, n_out: int, std: float, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _gates(width: int, n_heads: int, input_bias: Tensor) -> tuple[nn.Linear, nn.Linear]:
    """The maps to the preactivations of i and f, constant at first."""
    igate, fgate = _linear(width, n_heads, 0.0, bias=True), _linear(width, n_heads, 0.0, bias=True)
    with torch.no_grad():
        igate.bias.copy_(input_bias)
        fgate.bias.copy_(torch.linspace(3, 6, n_heads))
    return igate, fgate
