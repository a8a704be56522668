"""The linear recurrent unit: a diagonal recurrence of complex numbers, inside its block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers._state_space import Activation, ActivationName, as_complex, as_pairs, drawn, driven, ring
from zoo.mixers.parts import Backend, precise
from zoo.ops import scan
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register


class LRUState(NamedTuple):
    h: Tensor  # (B, 2 N), pairs (re, im)


@register("lru")
class LRU(Mixer):
    """The linear recurrent unit: complex states, each of which turns and decays at its own rate (Orvieto et al. 2023,
    arXiv 2303.06349).

    Sections 3 and 4 of the paper:

        lambda = exp(-exp(nu_log) + i exp(theta_log)) ;  h_t = lambda h_{t-1} + exp(gamma_log) (B x_t)
        y_t = Re(C h_t) + D x_t ;  out = (W_1 g + b_1) sigmoid(W_2 g + b_2) with g = gelu(y)

    N complex numbers h, of which the input sets what is written and never how long it stays. |lambda| < 1 whatever is
    learned. Inits as published: lambda uniform on the ring of `radius_range`, with angles up to `max_phase`; exp(gamma)
    = sqrt(1 - |lambda|^2), so that every state has the size of its input; B and C normal with variances 1 / (2 D)
    and 1 / N for each part, D normal. W_1 and W_2 are normal with variance 1 / D.

    | state | cost per token   | parallel form | cannot                                                       |
    |-------|------------------|---------------|--------------------------------------------------------------|
    | 2 N   | 8 D N + 4 D^2    | a scan        | choose by content what to keep: its decays read no input     |

    The recurrence runs in float32 at least. `in_proj` has B's real and imaginary rows in turn, `out_proj` the columns
    of Re C and -Im C in turn.
    """

    traits = Traits(cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            d_state: N, complex numbers of state, by default D.
            radius_range: |lambda| starts between these; 0.9 to 0.999 for long memories.
            max_phase: angles of lambda start uniform from 0 to this, at most 2 pi; small ones for long memories.
            activation: what follows the recurrence: "full_glu" is the published block, None the bare recurrence, for
                a channel mixer behind it.
            backend: form of the op.
        """

        d_state: int | None = Field(default=None, ge=1)
        radius_range: tuple[float, float] = (0.0, 1.0)
        max_phase: float = Field(default=2 * math.pi, gt=0, le=2 * math.pi)
        activation: ActivationName | None = "full_glu"
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        low, high = config.radius_range
        if not 0 <= low <= high <= 1:
            raise UsageError(
                f"lru: radius_range=[{low:g}, {high:g}] is not allowed: it should be 0 <= low <= high <= 1."
            )
        n = self.d_state = config.d_state or d_model
        modulus = ring(n, low, high)
        self.nu_log = nn.Parameter((-modulus.log()).log())
        self.theta_log = nn.Parameter((config.max_phase * drawn(n, low=1e-6, high=1)).log())
        self.gamma_log = nn.Parameter(0.5 * (1 - modulus.square()).log())
        self.in_proj = nn.Linear(d_model, 2 * n, bias=False)
        self.out_proj = nn.Linear(2 * n, d_model, bias=False)
        self.D = nn.Parameter(torch.randn(d_model))
        self.activation = Activation(d_model, config.activation)
        nn.init.normal_(self.in_proj.weight, std=(2 * d_model) ** -0.5)
        nn.init.normal_(self.out_proj.weight, std=n**-0.5)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> LRUState:
        device, dtype = first_parameter_like(self, device, dtype)
        return LRUState(torch.zeros(batch_size, 2 * self.d_state, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        rate, angle, gamma = (precise(p).exp() for p in (self.nu_log, self.theta_log, self.gamma_log))
        decay = torch.polar((-rate).exp(), angle)
        before = None if state is None else as_complex(state.h)
        u = driven(x, self.in_proj, gamma)
        h, last = scan(decay, u, before, backend=self.config.backend, **packing(context))
        y = torch.addcmul(self.out_proj(as_pairs(h).to(x.dtype)), x, self.D)
        return self.activation(y), LRUState(as_pairs(last))

    def flops_per_token(self, context_length: int) -> int:
        return 8 * self.d_model * self.d_state + self.activation.flops(self.d_model)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_state": 5, "radius_range": (0.5, 0.99), "max_phase": 1.0, "activation": None, "backend": "reference"},
            {"d_state": 24, "activation": "half_glu1", "backend": "chunked"},
        ]
