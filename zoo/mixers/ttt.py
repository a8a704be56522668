"""TTT: layers whose state is the weights of a small model that is trained on every sequence."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import CausalConv, init_projections, precise
from zoo.ops import InnerState, rotary_table, rotary_width, rotate, ttt
from zoo.ops.modules import widely
from zoo.protocol import (
    Context,
    Mixer,
    Place,
    State,
    derive_heads,
    first_parameter_like,
    packing,
    recurrent_dtype,
    register,
)
from zoo.states import document_positions

INNER_STD = 0.02  # the authors', of the inner model's weights and of the projection to inner learning rates


class TTTState(NamedTuple):
    conv: Tensor  # (B, W - 1, D): the last inputs of the convolutions
    inner: InnerState  # how far the inner model has moved, and its place in the mini-batch


@register("ttt")
class TTT(Mixer):
    """TTT: a small model in every head that learns while it reads (Sun et al. 2024, arXiv 2407.04620).

    TTT-Linear and TTT-MLP, sections 2.3 to 2.7, as in the authors' code:

        q, k, v = R W x, k and v of each head ;  eta_t = base_rate sigmoid(w_eta x_t + b_eta) / K
        l_s(W) = |k_s + LN(f(k_s; W)) - v_s|^2 / 2,  f(k; W) = W_1 k + b_1, or W_2 gelu(W_1 k + b_1) + b_2
        W_t = W_b - max(1 / (i + 1) + a_i, 0) sum over the steps s <= t of the mini-batch of eta_s dl_s/dW (W_b)
        y = W_o LayerNorm(q_t + LN(f(q_t; W_t)))                               times gelu(W_g x) with `gate`

    A mini-batch starts with each document; W_b are the weights at its end, the learned W_0 at first. i = 0 .. n - 1 is
    the place of t in its mini-batch, which rotates q and k too (R). The state has the sum of gradients and the place,
    so a sequence can be cut within a mini-batch. Inits: W_0, w_eta std 0.02, a and biases 0, projections fan_in^-0.5.
    The authors' Mamba backbone is `share_qk=True, gate=True`; its convolution before the layer is `short_conv`.

    | state (TTT-Linear)   | cost per token          | parallel form               | cannot                        |
    |----------------------|-------------------------|-----------------------------|-------------------------------|
    | 2 D (K + 1) + 1      | 8 D^2 + 2 D H + 4 D K   | n steps at a time, O(T) in  | recall a step exactly; let    |
    | TTT-MLP: about 16 DK | TTT-MLP: about 40 D K   | all; the mini-batches one   | the gradients of a mini-batch |
    |                      | for the 4 D K           | after the other             | see each other                |
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, by default heads of the smallest width from 64 that cuts D into equal heads.
            inner: the inner model, one linear layer or an MLP of two.
            expand: hidden width of the MLP, as a multiple of K.
            mini_batch: n, steps whose gradients are taken at the same weights.
            base_rate: the largest inner learning rate times K (the authors: 1, and 0.1 for the MLP).
            share_qk: one projection for q and k, each followed by a convolution of its own.
            conv_size: W, steps in the window of those convolutions.
            gate: use an output gate.
            rope_base: the slowest rotation takes about 2 pi base steps.
            norm_eps: added to the variance in both norms.
            backend: form of the op.
        """

        n_heads: int | None = Field(default=None, ge=1)
        inner: Literal["linear", "mlp"] = "linear"
        expand: int = Field(default=4, ge=1)
        mini_batch: int = Field(default=16, ge=1)
        base_rate: float | None = Field(default=None, gt=0)
        share_qk: bool = False
        conv_size: int = Field(default=4, ge=1)
        gate: bool = False
        rope_base: float = Field(default=10000.0, gt=0)
        norm_eps: float = Field(default=1e-6, gt=0)
        backend: Literal["auto", "reference", "chunked"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        for option, belongs, used in (
            ("conv_size", "share_qk", c.share_qk),
            ("expand", 'inner="mlp"', c.inner == "mlp"),
        ):
            if option in c.changed() and not used:
                raise UsageError(f"{self.name}: {option} belongs to {belongs}, which is not set.")
        if c.n_heads and d_model % c.n_heads:
            raise UsageError(f"{self.name}: n_heads={c.n_heads} does not divide d_model={d_model}.")
        self.n_heads = H = c.n_heads or derive_heads(d_model, 64)
        self.head_dim = K = d_model // H
        self.base_rate = c.base_rate or (1.0 if c.inner == "linear" else 0.1)
        self.n_parts = 2 + (not c.share_qk) + c.gate
        self.in_proj = nn.Linear(d_model, self.n_parts * d_model, bias=False)
        self.rate_proj = nn.Linear(d_model, H)
        if c.share_qk:
            self.conv_q, self.conv_k = (
                CausalConv(d_model, c.conv_size, bias=True, activation=None, backend=c.backend) for _ in "qk"
            )
        hidden = c.expand * K
        self.sizes = [(K, K)] if c.inner == "linear" else [(K, hidden), (hidden, K)]
        for i, (inputs, outputs) in enumerate(self.sizes, 1):
            self.register_parameter(f"W{i}", nn.Parameter(torch.empty(H, inputs, outputs).normal_(std=INNER_STD)))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(H, 1, outputs)))
        self.places = nn.Parameter(torch.zeros(c.mini_batch))
        self.inner_norm_weight, self.inner_norm_bias = nn.Parameter(torch.ones(H, K)), nn.Parameter(torch.zeros(H, K))
        self.norm = nn.LayerNorm(d_model, eps=c.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)
        nn.init.normal_(self.rate_proj.weight, std=INNER_STD)
        nn.init.zeros_(self.rate_proj.bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> TTTState:
        device, dtype = first_parameter_like(self, device, dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=recurrent_dtype(dtype))

        moved, sums = (
            tuple(zeros(self.n_heads, inputs + 1, outputs) for inputs, outputs in self.sizes) for _ in range(2)
        )
        conv = zeros(self.config.conv_size - 1 if self.config.share_qk else 0, self.d_model)
        return TTTState(conv, InnerState(moved, sums, torch.zeros(batch_size, dtype=torch.int64, device=device)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c, H = self.config, self.n_heads
        conv, inner = (None, None) if state is None else state
        q, *rest = self.in_proj(x).chunk(self.n_parts, -1)
        if c.share_qk:
            again = None if conv is None else conv.clone()  # the first one consumes what both read
            (q, conv), (k, _) = self.conv_q(q, conv, context), self.conv_k(q, again, context)
        else:
            k, *rest = rest
            conv = x.new_zeros(len(x), 0, self.d_model, dtype=recurrent_dtype(x.dtype)) if conv is None else conv
        q, k, v = (m.unflatten(-1, (H, -1)) for m in (q, k, rest[0]))
        q, k = self._rotated(precise(q), precise(k), inner, context)
        rate = precise(self.rate_proj(x)).sigmoid() * (self.base_rate / self.head_dim)
        place = torch.arange(1, c.mini_batch + 1, device=x.device, dtype=q.dtype)
        spread = (1 / place + self.places).clamp(min=0)
        weights = tuple(torch.cat([w, b], 1) for w, b in self._inner_weights())
        norm = self.inner_norm_weight, self.inner_norm_bias
        o, inner = ttt(
            q, k, v, rate, spread, weights, norm, inner, eps=c.norm_eps, backend=c.backend, **packing(context)
        )
        o = F.layer_norm(o, o.shape[-1:], eps=c.norm_eps) * precise(norm[0]) + precise(norm[1])
        o = widely(self.norm, (q + o).flatten(-2))
        if c.gate:
            o = o * F.gelu(precise(rest[1]), approximate="tanh")
        return self.out_proj(o.to(x.dtype)), TTTState(conv, inner)

    def _inner_weights(self) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, f"W{i}"), getattr(self, f"b{i}")) for i in range(1, len(self.sizes) + 1)]

    def _rotated(
        self, q: Tensor, k: Tensor, inner: InnerState | None, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        """q and k turned by their place in the mini-batch."""
        start = torch.zeros(len(q), dtype=torch.int64, device=q.device) if inner is None else inner.position
        resets = None if context is None else context.resets
        places = document_positions(start, q.shape[1], resets) % self.config.mini_batch
        cos, sin = rotary_table(places, rotary_width(self.head_dim), base=self.config.rope_base)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def flops_per_token(self, context_length: int) -> int:
        D, H = self.d_model, self.n_heads
        projections = D * ((self.n_parts + 1) * D + H)
        layers = [(inputs + 1) * outputs for inputs, outputs in self.sizes]
        back = self.sizes[1][0] * self.sizes[1][1] if len(layers) == 2 else 0
        return 2 * projections + 2 * H * (2 * sum(layers) + back)  # of keys and of queries

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {"n_heads": 2},
            {"n_heads": 2, "inner": "mlp", "expand": 2, "mini_batch": 5, "base_rate": 0.5, "share_qk": True}
            | {"conv_size": 3, "gate": True, "rope_base": 100.0, "norm_eps": 1e-4},
        ]
