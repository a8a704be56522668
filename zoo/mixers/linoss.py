"""LinOSS: a state space of driven oscillators."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers._state_space import Activation, ActivationName, drawn, known_spans, on_weight, ring
from zoo.mixers.parts import Backend, check_range, precise
from zoo.ops import oscillate
from zoo.ops.common import widest
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register

SHORTEST = 1e-3
"""Step size below which the bound on A rises no further, as in the authors' code."""


class LinOSSState(NamedTuple):
    x: Tensor  # (B, 2, 2 P): the speeds z and the places y of the real and the imaginary oscillators


@register("linoss")
class LinOSS(Mixer):
    """LinOSS: forced oscillators, which ring at frequencies of their own (Rusch and Rus 2025, arXiv 2410.03943).

    Section 2 of the paper, and with `damping` section 3 of D-LinOSS (Boyer et al. 2025, arXiv 2505.12171):

        dz/dt = -A y - G z + B x ;  dy/dt = z ;  out = (W_1 g + b_1) sigmoid(W_2 g + b_2) with g = gelu(Re(C y) + D x)
        z_t = z_{t-1} + Delta_t (-A y_t - G z_t + B x_t) ;  y_t = y_{t-1} + Delta_t z_t                  ("im")
        z_t = z_{t-1} + Delta_t (-A y_{t-1} - G z_t + B x_t) ;  y_t = y_{t-1} + Delta_t z_t              ("imex")

    with Delta_t = sigmoid(dt) dt_t for each oscillator, where dt_t is the time since the previous step,
    `context.timespans`, 1 by default, and G = 0 without damping. B x is complex: 2 P real oscillators, of which pairs
    share A, G and the step size. "im" loses energy with every step, whatever the time spans. "imex" loses none, so that
    it forgets nothing without damping, and it is stable for steps that are equal: with time spans that vary, states can
    grow. A is relu(A), and with "imex" at most 4 / Delta^2; with damping, G is relu(G), and A is kept where the two
    eigenvalues are a conjugate pair, as in the authors' code. (With "im" that code lets G go down to -Delta A. Such
    states would grow where a time span is shorter.)

    | state | cost per token   | parallel form | cannot                                                       |
    |-------|------------------|---------------|--------------------------------------------------------------|
    | 4 P   | 8 D P + 4 D^2    | a scan        | choose by content what to keep; without damping and with     |
    |       |                  |               | "imex", forget                                               |

    The recurrence runs in float32 at least. `in_proj` has B's real rows, then its imaginary ones, and `out_proj` the
    columns of Re C, then those of -Im C.
    """

    traits = Traits(reads_timespans=True)

    class Config(Options):
        """The options.

        Attributes:
            d_state: P, pairs of oscillators, by default D.
            discretization: how a step of the differential equation is taken: implicit "im" or implicit-explicit "imex".
            damping: learn the damping G of every oscillator (D-LinOSS). A and G then start such that the eigenvalues of
                a step lie on a ring.
            A_init_range: without damping, A starts uniform between these: frequencies sqrt(A) in radians for a time of
                1 / sigmoid(dt), which is about 1.6. Larger ones suit fast signals and short time spans.
            radius_range: with damping, moduli of the eigenvalues start between these.
            max_phase: with damping, their angles start uniform from 0 to this, at most pi; with "im" not beyond the
                angle at which the rule alone has the modulus that was drawn, arccos of it.
            activation: what follows the recurrence: "full_glu" is the published block, None the bare recurrence, for a
                channel mixer behind it.
            backend: form of the op.
        """

        d_state: int | None = Field(default=None, ge=1)
        discretization: Literal["im", "imex"] = "im"
        damping: bool = False
        A_init_range: tuple[float, float] = (0.0, 1.0)
        radius_range: tuple[float, float] = (0.9, 1.0)
        max_phase: float = Field(default=math.pi, gt=0, le=math.pi)
        activation: ActivationName | None = "full_glu"
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c, (low, high) = config, config.radius_range
        for name in ("A_init_range",) if c.damping else ("radius_range", "max_phase"):
            if name in c.changed():
                raise UsageError(f"linoss: {name} has no effect with damping={c.damping}.")
        check_range(self.name, "A_init_range", c.A_init_range, zero=True)
        if not 0 < low <= high <= 1:
            raise UsageError(
                f"linoss: radius_range=[{low:g}, {high:g}] is not allowed: it should be 0 < low <= high <= 1."
            )
        n = self.d_state = c.d_state or d_model
        self.G: nn.Parameter | None = None
        if c.damping:
            self.dt = nn.Parameter(0.5 * torch.randn(n))
            modulus, furthest = ring(n, low, high), torch.full((n,), c.max_phase)
            furthest = furthest.minimum(modulus.acos()) if c.discretization == "im" else furthest
            A, G = self._on_ring(modulus, drawn(n, low=0, high=1) * furthest, self.dt.detach().sigmoid())
            self.A, self.G = nn.Parameter(A), nn.Parameter(G)
        else:
            self.dt = nn.Parameter(torch.rand(n))
            self.A = nn.Parameter(drawn(n, low=c.A_init_range[0], high=c.A_init_range[1]))
        self.in_proj = nn.Linear(d_model, 2 * n, bias=False)
        self.out_proj = nn.Linear(2 * n, d_model, bias=False)
        self.D = nn.Parameter(torch.randn(d_model))
        self.activation = Activation(d_model, c.activation)
        nn.init.uniform_(self.in_proj.weight, -(d_model**-0.5), d_model**-0.5)
        nn.init.uniform_(self.out_proj.weight, -(n**-0.5), n**-0.5)

    def _on_ring(self, modulus: Tensor, angle: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """A and G for which the eigenvalues of a step are modulus * exp(+- i angle).

        Their product is 1 / S, with S as in `_coefficients`, and their sum gives the other equation.
        """
        turn = 2 * angle.cos() / modulus
        if self.config.discretization == "imex":
            return (1 + modulus**-2 - turn) / dt**2, (modulus**-2 - 1) / dt
        return (1 + modulus**-2 - turn) / dt**2, (turn - 2) / dt

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> LinOSSState:
        device, dtype = first_parameter_like(self, device, dtype)
        return LinOSSState(torch.zeros(batch_size, 2, 2 * self.d_state, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        dtype = recurrent_dtype(x.dtype)
        p, q, dt = (m.to(dtype) for m in self._coefficients(known_spans(context, x.shape[1], widest(x.device))))
        if on_weight(x, self.in_proj, dt):
            b = precise(F.linear(x, (precise(self.in_proj.weight) * dt.repeat(2)[:, None]).to(x.dtype)))
            b = b.unflatten(-1, (2, -1))
        else:
            b = precise(self.in_proj(x)).unflatten(-1, (2, -1)) * dt.unsqueeze(-2)
        before = None if state is None else state.x.unflatten(-1, (2, -1))
        y, last = oscillate(b, p, q, dt, before, backend=self.config.backend, **packing(context))
        y = torch.addcmul(self.out_proj(y.flatten(-2).to(x.dtype)), x, self.D)
        return self.activation(y), LinOSSState(last.flatten(-2))

    def _coefficients(self, spans: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """1 / S, Delta A / S and Delta: (P), or (B, T, P) where times are given; in float64 where there is one.

        Both rules are z_t = (z_{t-1} - Delta A y_{t-1} + Delta B x_t) / S, with S = 1 + Delta G (+ Delta^2 A for "im").
        """
        wide = widest(self.D.device)
        A, dt = self.A.to(wide), self.dt.to(wide).sigmoid()
        dt = dt if spans is None else dt * spans
        if self.config.discretization == "imex":
            G = A.new_zeros(()) if self.G is None else self.G.to(wide).relu()
            root = (1 + dt * G).sqrt()
            low, high = (G / (root + 1)).square(), ((root + 1) / dt.clamp(min=SHORTEST)).square()
            A, S = low + (A - low).relu() - (A - high).relu(), 1 + dt * G
        elif self.G is None:
            A = A.relu()
            S = 1 + dt.square() * A
        else:
            G = self.G.to(wide).relu()
            A = G.square() / 4 + (A - G.square() / 4).relu()
            S = 1 + dt * G + dt.square() * A
        return 1 / S, dt * A / S, dt

    def flops_per_token(self, context_length: int) -> int:
        return 8 * self.d_model * self.d_state + self.activation.flops(self.d_model)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_state": 5, "damping": True, "discretization": "imex", "radius_range": (0.5, 0.9), "activation": None}
            | {"max_phase": 2.0, "backend": "reference"},
            {"d_state": 12, "A_init_range": (0.5, 4.0), "activation": "half_glu1"},
        ]
