"""A gated perceptron along time: every step reads all steps, with weights that depend on their positions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers._rnn import by_document
from zoo.ops import gated_mlp, normed_product, silu_product
from zoo.ops.common import blank, valid_steps
from zoo.ops.derivatives import batched
from zoo.ops.modules import bare
from zoo.protocol import Context, Mixer, Place, State, Traits, register

LONGEST = 1024


@register("token_mlp")
class TokenMLP(Mixer):
    """A SwiGLU over the steps of each channel, instead of attention (TRM's MLP form, arXiv 2510.04871, section 4.5).

        y_{:, d} = W_down (silu(W_gate x_{:, d}) * W_up x_{:, d}),   W_gate, W_up (M, N), W_down (N, M)

    for sequences of at most N steps; a shorter one counts as padded with zeros. All D channels share the weights
    (MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601). Not causal. Inits: normal, std fan_in^-0.5, W_down divided
    by sqrt(2 n_layers). `inner_norm` is that of `swiglu`.

    | state | cost per token | parallel form      | cannot                                      |
    |-------|----------------|--------------------|---------------------------------------------|
    | none  | 6 D M          | every step at once | read left to right, read more than N steps  |
    """

    class Config(Options):
        """The options.

        Attributes:
            length: N, by default the model's `max_len` (which an experiment takes from its task), else 1024.
            d_hidden: M, by default 8/3 N rounded up to a multiple of 32.
            inner_norm: an RMS norm of the product of W_gate x and W_up x, before the sigmoid of W_gate x gates it.
        """

        length: int | None = Field(default=None, ge=1)
        d_hidden: int | None = Field(default=None, ge=1)
        inner_norm: bool = False

    traits = Traits(
        not_compilable_packed="Packed documents are taken as rows of their own, whose number depends on the data.",
        takes_length=True,
    )
    causal = False

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.length = N = config.length or place.length or LONGEST
        self.d_hidden = M = config.d_hidden or -(-8 * N // 96) * 32
        self.gate_proj, self.up_proj = nn.Linear(N, M, bias=False), nn.Linear(N, M, bias=False)
        self.down_proj = nn.Linear(M, N, bias=False)
        nn.init.normal_(self.gate_proj.weight, std=N**-0.5)
        nn.init.normal_(self.up_proj.weight, std=N**-0.5)
        nn.init.normal_(self.down_proj.weight, std=(2 * place.n_layers * M) ** -0.5)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        if state:
            raise UsageError("token_mlp looks ahead and takes no state.")
        lengths, resets = (None, None) if context is None else (context.lengths, context.resets)
        if resets is not None and batched():
            raise UsageError("token_mlp: documents are rows of their own, whose number no vmap can follow.")
        if resets is not None:
            return by_document(lambda x, _, lengths: (self._mix(x, lengths), ()), x, (), lengths, resets)
        return self._mix(x, lengths), ()

    def step(self, x_t: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        raise UsageError("token_mlp looks ahead, so it cannot go step by step: use forward.")

    def _mix(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        T = x.shape[1]
        if self.length < T:
            raise UsageError(f"{self.name}: {T} steps are more than length={self.length}.")
        padding = None if lengths is None else ~valid_steps(lengths, T)
        h = x if padding is None else blank(x, padding)
        if bare(self.gate_proj, self.up_proj, self.down_proj):
            weights = self.gate_proj.weight[:, :T], self.up_proj.weight[:, :T], self.down_proj.weight[:T]
            y = gated_mlp(h, *weights, along_time=True, inner_norm=self.config.inner_norm)
        else:
            h = F.pad(h.mT, (0, self.length - T))
            product = normed_product if self.config.inner_norm else silu_product
            y = self.down_proj(product(self.gate_proj(h), self.up_proj(h)))[..., :T].mT
        return y if padding is None else blank(y, padding)

    def flops_per_token(self, context_length: int) -> int:
        return 6 * self.d_model * self.d_hidden

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"length": 1001, "d_hidden": 12}, {"d_hidden": 32, "inner_norm": True}]
