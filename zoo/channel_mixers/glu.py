"""Gated feed-forward layers: glu with any activation, and geglu and swiglu with their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.canon import Canon, require_causal
from zoo.core.options import Options
from zoo.ops import gated_mlp, normed_product
from zoo.ops.modules import bare
from zoo.protocol import Context, Mixer, Place, State, Traits, register
from zoo.use_adapters import UseAdapters

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
GPT_OSS_SLOPE, GPT_OSS_LIMIT = 1.702, 7.0

Gate = Literal["gelu", "gelu_tanh", "gpt_oss", "identity", "relu", "relu_squared", "sigmoid", "silu"]


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up; `gpt_oss` clamps both, has the slope 1.702 within the SiLU, and adds one to `up`."""
    if activation == "gpt_oss":
        gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
        return gate * torch.sigmoid(GPT_OSS_SLOPE * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


def hidden_width(d_model: int, share: int = 1) -> int:
    """8/3 D / share, rounded up to a multiple of 32."""
    return -(-8 * d_model // (3 * share) // 32) * 32


class GLUOptions(Options):
    """The options of every gated layer.

    Attributes:
        d_hidden: inner width, by default 8/3 D rounded up to a multiple of 32.
        bias: biases of all three projections.
        gate_scale: factor on W_gate x, within the activation (Falcon-H1).
        canon_d: W, taps of a Canon layer on W_gate x and W_up x together (Canon-D); published: 4.
        adapter_rank: r, rank of an adapter on W_gate and W_up together, one for each use of the `shared` block that
            the word belongs to (Zamba2).
    """

    d_hidden: int | None = Field(default=None, ge=1)
    bias: bool = False
    gate_scale: float = 1.0
    canon_d: int | None = Field(default=None, ge=2, le=1024)
    adapter_rank: int | None = Field(default=None, ge=1)


class GatedState(NamedTuple):
    canon: Tensor  # (B, W - 1, 2 d_hidden): the last W_gate x and W_up x


class GatedLayer(Mixer):
    """y = W_down (act(W_gate x) * W_up x); subclasses say which activation. With `canon_d` it has a state."""

    kind = "channel"
    inner_norm = False
    traits = Traits(narrows=True)

    def __init__(self, d_model: int, config: Any, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = config.d_hidden or hidden_width(d_model)
        self.gate_proj = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.up_proj = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.down_proj = nn.Linear(self.d_hidden, place.d_out or d_model, bias=config.bias)
        self.adapters = None
        if config.adapter_rank is not None:
            self.adapters = UseAdapters(d_model, [2 * self.d_hidden], config.adapter_rank, place.uses)
        self.canon = None
        if config.canon_d is not None:
            require_causal("canon_d", config.canon_d, place)
            self.canon = Canon(2 * self.d_hidden, config.canon_d)
            self.traits = Traits(cuts_in_ops=True, narrows=True)
        nn.init.normal_(self.gate_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.up_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.down_proj.weight, std=(2 * place.n_layers * self.d_hidden) ** -0.5)
        if config.bias:
            for layer in (self.gate_proj, self.up_proj, self.down_proj):
                nn.init.zeros_(layer.bias)

    @property
    def activation(self) -> str:
        return self.config.activation

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return () if self.canon is None else GatedState(self.canon.init_state(batch_size, device, dtype))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        scale = self.config.gate_scale
        plain = self.activation == "silu" and scale == 1.0 and not self.config.bias and self.canon is None
        plain = plain and self.adapters is None
        if plain and bare(self.gate_proj, self.up_proj, self.down_proj):
            weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            return gated_mlp(x, *weights, inner_norm=self.inner_norm), ()
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.adapters is not None:
            of_gate, of_up = self.adapters(x, context).chunk(2, -1)
            gate, up = gate + of_gate, up + of_up
        after: State = ()
        if self.canon is not None:
            both, last = self.canon(
                torch.cat([gate, up], -1), None if state is None else state.canon, context or Context()
            )
            gate, up = both.chunk(2, -1)
            after = GatedState(last)
        gate = gate if scale == 1.0 else gate * scale
        hidden = normed_product(gate, up) if self.inner_norm else gated(self.activation, gate, up)
        return self.down_proj(hidden), after

    def flops_per_token(self, context_length: int) -> int:
        adapted = 0 if self.adapters is None else self.adapters.flops_per_token()
        return 2 * (2 * self.d_model + (self.place.d_out or self.d_model)) * self.d_hidden + adapted


@register("glu")
class GLU(GatedLayer):
    """A gated layer with any activation: y = W_down (act(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202,
    equations 5 and 6).

    `sigmoid` is the gated linear unit of Dauphin et al. 2017 (arXiv 1612.08083), `identity` the bilinear layer, `relu`
    ReGLU, `gpt_oss` the clamped gate of GPT-OSS: with g = min(W_gate x, 7) and u = W_up x clamped to [-7, 7],
    g sigmoid(1.702 g) (u + 1). Init as in `swiglu`.

    | state | cost per token | parallel form      | cannot             |
    |-------|----------------|--------------------|--------------------|
    | none  | 6 D d_hidden   | every step at once | see any other step |
    """

    class Config(GLUOptions):
        """The options.

        Attributes:
            d_hidden: inner width, by default 8/3 D rounded up to a multiple of 32.
            bias: biases of all three projections.
            gate_scale: factor on W_gate x, within the activation (Falcon-H1).
            canon_d: W, taps of a Canon layer on W_gate x and W_up x together (Canon-D); published: 4.
            adapter_rank: r, rank of an adapter on W_gate and W_up together, one for each use of the `shared` block that
                the word belongs to (Zamba2).
            activation: activation of the gate.
        """

        activation: Gate = "sigmoid"

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        others = ("gelu", "gelu_tanh", "identity", "relu", "relu_squared", "silu")
        return [
            {},
            {"d_hidden": 40, "bias": True, "gate_scale": 1.3, "activation": "gpt_oss", "adapter_rank": 3},
            *({"activation": activation} for activation in others),
            {"d_hidden": 24, "canon_d": 2},
        ]


@register("geglu")
class GEGLU(GatedLayer):
    """A gated layer with GELU: y = W_down (gelu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202, equation 6).

    Gemma is `approximate=True`. Width and init as in `swiglu`.

    | state | cost per token | parallel form      | cannot             |
    |-------|----------------|--------------------|--------------------|
    | none  | 6 D d_hidden   | every step at once | see any other step |
    """

    class Config(GLUOptions):
        """The options.

        Attributes:
            d_hidden: inner width, by default 8/3 D rounded up to a multiple of 32.
            bias: biases of all three projections.
            gate_scale: factor on W_gate x, within the activation (Falcon-H1).
            canon_d: W, taps of a Canon layer on W_gate x and W_up x together (Canon-D); published: 4.
            adapter_rank: r, rank of an adapter on W_gate and W_up together, one for each use of the `shared` block that
                the word belongs to (Zamba2).
            approximate: GPT-2's approximation of GELU by a hyperbolic tangent.
        """

        approximate: bool = False

    @property
    def activation(self) -> Literal["gelu", "gelu_tanh"]:
        return "gelu_tanh" if self.config.approximate else "gelu"

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_hidden": 40, "bias": True, "gate_scale": 0.7, "approximate": True, "adapter_rank": 3},
            {"d_hidden": 24, "canon_d": 3},
        ]


@register("swiglu")
class SwiGLU(GatedLayer):
    """A gated layer with SiLU: y = W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202, equation 6).

    The width 8/3 D gives the number of weights of a 4 D perceptron (section 3 of the paper; rounding as in Llama).
    Init: normal with std fan_in^-0.5, W_down divided by sqrt(2 n_layers) (GPT-2).

    With `inner_norm` it is W_down (sigmoid(W_gate x) * norm(W_gate x * W_up x)) with an RMS norm without weights: the
    product keeps its size however large an optimizer like Muon makes the weights (Dillon 2026, arXiv 2601.19085).

    | state | cost per token | parallel form      | cannot             |
    |-------|----------------|--------------------|--------------------|
    | none  | 6 D d_hidden   | every step at once | see any other step |
    """

    class Config(GLUOptions):
        """The options.

        Attributes:
            d_hidden: inner width, by default 8/3 D rounded up to a multiple of 32.
            bias: biases of all three projections.
            gate_scale: factor on W_gate x, within the activation (Falcon-H1).
            canon_d: W, taps of a Canon layer on W_gate x and W_up x together (Canon-D); published: 4.
            adapter_rank: r, rank of an adapter on W_gate and W_up together, one for each use of the `shared` block that
                the word belongs to (Zamba2).
            inner_norm: an RMS norm of the product of W_gate x and W_up x, before the sigmoid of W_gate x gates it.
        """

        inner_norm: bool = False

    activation = "silu"

    @property
    def inner_norm(self) -> bool:  # type: ignore[override]
        return self.config.inner_norm

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_hidden": 40, "bias": True, "gate_scale": 0.7, "inner_norm": True, "adapter_rank": 3},
            {"inner_norm": True},
            {"d_hidden": 24, "canon_d": 4},
        ]
