"""HGRN2: gated linear attention whose keys are what the decays leave over, with a lower bound for each layer."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import Backend, CausalConv, conv_backend, init_projections, main_backend, precise, project
from zoo.norms import GatedRMSNorm
from zoo.ops import linear_attention
from zoo.parameters import set_rule
from zoo.protocol import (
    Context,
    Mixer,
    Place,
    State,
    Traits,
    derive_heads,
    first_parameter_like,
    packing,
    recurrent_dtype,
    register,
)

BOUNDS = "hgrn2.lower_bounds"  # (n_layers, D) in the context: the bounds of all layers, from the model's first one


class HGRN2State(NamedTuple):
    conv: Tensor  # (B, W - 1, 3 D): the last inputs of the convolution
    memory: Tensor  # (B, H, K, K)


@register("hgrn2")
class HGRN2(Mixer):
    """HGRN2: gated linear attention with keys 1 - f, where f is the decay (Qin et al. 2024, arXiv 2404.07904).

    Equations 6 to 8 of the paper, as in flash-linear-attention:

        q, f, v = W x ;  f = b + (1 - b) sigmoid(f) ;  k = 1 - f
        S_t = diag(f_t) S_{t-1} + k_t v_t^T ;  o_t = S_t^T silu(q_t) / sqrt(K)
        y = W_out RMSNorm(o)                                          the norm runs over all heads

    b (D) is the layer's lower bound: 0 in the first layer, and larger in later ones, so that these remember longer. The
    bounds of a model's layers are learned together, as b_l = sum over 1 <= i <= l of softmax(logits)_i for each
    channel: the model's first layer holds the logits of all layers, and leaves the bounds in `context.shared`. A layer
    that finds none there (the model's first layer is another word, or a layer runs alone) takes layer / n_layers, the
    bounds with which learning starts.

    | state            | cost per token   | parallel form         | cannot                                           |
    |------------------|------------------|-----------------------|--------------------------------------------------|
    | D K, 3 (W - 1) D | 8 D^2 + 2 D K    | chunked matmuls, O(T) | write to a channel that it keeps; overwrite what |
    |                  |                  |                       | it has stored; track states such as parity       |
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            head_dim: K, channels of a head; by default at least min(128, D / 4) of them, or 16 (published: 128).
            lower_bounds: "learned" (published), "fixed" to layer / n_layers, or "none" for 0 in all layers.
            conv_size: W, steps in the window of a convolution over q, f and v; 0 for none.
            conv_bias: a bias of the convolution.
            norm_eps: added to the mean square in the norm.
            backend: form of the op.
        """

        head_dim: int | None = Field(default=None, ge=1)
        lower_bounds: Literal["learned", "fixed", "none"] = "learned"
        conv_size: int = Field(default=0, ge=0)
        conv_bias: bool = False
        norm_eps: float = Field(default=1e-5, gt=0)
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        if c.head_dim and d_model % c.head_dim:
            raise UsageError(f"{self.name}: head_dim={c.head_dim} does not divide d_model={d_model}.")
        self.n_heads = d_model // c.head_dim if c.head_dim else derive_heads(d_model, min(128, max(16, d_model // 4)))
        self.head_dim = d_model // self.n_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # q, f, v
        self.conv = None
        if c.conv_size:
            self.conv = CausalConv(
                3 * d_model, c.conv_size, bias=c.conv_bias, activation=None, backend=conv_backend(c.backend)
            )
        self.logits = None
        if c.lower_bounds == "learned" and place.layer == 0 and place.n_layers > 1:
            self.logits = nn.Parameter(torch.zeros(place.n_layers, d_model))
        self.norm = GatedRMSNorm(d_model, eps=c.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        init_projections(self.in_proj, self.out_proj, place)
        set_rule(self, "logits", weight_decay=False)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> HGRN2State:
        device, dtype = first_parameter_like(self, device, dtype)
        shapes = self._state_shapes(batch_size)
        return HGRN2State(*(torch.zeros(s, device=device, dtype=recurrent_dtype(dtype)) for s in shapes))

    def _state_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = (batch_size, max(self.config.conv_size - 1, 0), 3 * self.d_model)
        return conv, (batch_size, self.n_heads, self.head_dim, self.head_dim)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        conv = state.conv
        if self.conv:
            qfv, conv = self.conv(self.in_proj(x), conv, context)
            q, f, v = qfv.chunk(3, -1)
        else:
            q, f, v = project(x, self.in_proj, [self.d_model] * 3)
        f = precise(f)
        bound = self._bound(f, context)
        log_decay, k = F.logsigmoid(f), torch.sigmoid(-f)
        if bound is not None:  # log(b + (1 - b) sigmoid(f)), exact for b near 0 and for decays near 1
            log_decay = log_decay if self.place.layer == 0 else log_decay + F.softplus(bound.log() - f)
            k = k * (1 - bound)
        q, k, v, log_decay = (m.unflatten(-1, (self.n_heads, -1)) for m in (F.silu(q), k, v, log_decay))
        o, memory = linear_attention(
            q,
            k,
            v,
            log_decay,
            state.memory,
            backend=main_backend(self.config.backend),
            in_place=True,
            **packing(context),
        )
        return self.out_proj(self.norm(o.flatten(-2)).to(x.dtype)), HGRN2State(conv, memory)

    def _bound(self, f: Tensor, context: Context | None) -> Tensor | None:
        """b (D), or (1,) for all channels; None for 0. The model's first layer leaves those of all layers.

        Its own are zeros too, used so that the logits have gradients in every model.
        """
        if self.logits is not None:
            shares = precise(self.logits).softmax(0)
            learned = shares.cumsum(0) - shares[:1]
            if context is not None:
                context.shared[BOUNDS] = learned
            return learned[0]
        if self.config.lower_bounds == "none" or self.place.layer == 0:
            return None
        bounds = context.shared.get(BOUNDS) if context is not None and self.config.lower_bounds == "learned" else None
        if bounds is not None:
            return bounds[self.place.layer]
        return torch.full((1,), self.place.layer / self.place.n_layers, device=f.device, dtype=f.dtype)

    def flops_per_token(self, context_length: int) -> int:
        return 8 * self.d_model**2 + 2 * self.d_model * self.head_dim  # the read S^T q

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"head_dim": 8, "conv_size": 3, "conv_bias": True, "lower_bounds": "fixed", "norm_eps": 1e-4},
            {"head_dim": 4, "lower_bounds": "none", "backend": "reference"},
        ]
