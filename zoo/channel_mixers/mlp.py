"""The two-layer perceptron of the Transformer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from zoo.channel_mixers.glu import ACTIVATIONS
from zoo.core.options import Options
from zoo.protocol import Context, Mixer, Place, State, register


@register("mlp")
class MLP(Mixer):
    """The perceptron of the Transformer: y = W_out act(W_in x + b_in) + b_out (Vaswani et al. 2017,
    arXiv 1706.03762, equation 2).

    GPT-2 is `activation="gelu_tanh"`; Primer and nanochat are `activation="relu_squared", bias=False` (So et al. 2021,
    arXiv 2109.08668, section 3). Init: normal with std fan_in^-0.5, W_out divided by sqrt(2 n_layers) (GPT-2).

    | state | cost per token | parallel form     | cannot               |
    |-------|----------------|-------------------|----------------------|
    | none  | 4 D d_hidden   | every step at once | see any other step  |
    """

    kind = "channel"

    class Config(Options):
        """The options.

        Attributes:
            d_hidden: inner width, 4 D by default.
            activation: gelu_tanh is GPT-2's approximation, relu_squared Primer's.
            bias: biases of both projections.
        """

        d_hidden: int | None = Field(default=None, ge=1)
        activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu"] = "gelu"
        bias: bool = True

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.d_hidden = config.d_hidden or 4 * d_model
        self.in_proj = nn.Linear(d_model, self.d_hidden, bias=config.bias)
        self.out_proj = nn.Linear(self.d_hidden, d_model, bias=config.bias)
        nn.init.normal_(self.in_proj.weight, std=d_model**-0.5)
        nn.init.normal_(self.out_proj.weight, std=(2 * place.n_layers * self.d_hidden) ** -0.5)
        if config.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        return self.out_proj(ACTIVATIONS[self.config.activation](self.in_proj(x))), ()

    def flops_per_token(self, context_length: int) -> int:
        return 4 * self.d_model * self.d_hidden

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_hidden": 40, "bias": False, "activation": "relu_squared"},
            {"activation": "gelu_tanh"},
            {"activation": "relu"},
            {"activation": "silu"},
        ]
