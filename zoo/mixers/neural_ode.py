"""The ODE-RNN: a neural differential equation between observations, a gated update at each."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers.parts import precise
from zoo.ops.common import blank, valid_steps, without_autocast
from zoo.ops.derivatives import TRANSFORMS, once_only, transformed
from zoo.ops.modules import bare, narrowly, widely
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, recurrent_dtype, register

EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4, "dopri5": 6}
"""Evaluations of f in a step; dopri5 takes two more to choose its first step."""
FIXED = ("euler", "midpoint", "rk4")
ADJOINT = "neural_ode: adjoint=True has no second derivatives; take adjoint=False."
LIBRARY = f"neural_ode: adjoint=True and solver='dopri5', torchdiffeq's own, do not serve {TRANSFORMS}."


class NeuralODEState(NamedTuple):
    h: Tensor  # (B, d_hidden)


@register("neural_ode")
class NeuralODE(Mixer):
    """ODE-RNN: a neural ODE between observations, and a GRU update at each (Rubanova et al. 2019, arXiv 1907.03907,
    section 3.1 and algorithm 1).

        h'_t = h_{t-1} + int_0^{dt_t} f(h) ds,  f(h) = W_n tanh(... tanh(W_1 h + b_1)) + b_n
        r, z = sigmoid(W_ir x_t + b_ir + W_hr h'_t + b_hr), sigmoid(W_iz x_t + b_iz + W_hz h'_t + b_hz)
        n = tanh(W_in x_t + b_in + r (W_hn h'_t + b_hn)) ;  h_t = (1 - z) n + z h'_t
        y_t = h_t, or W_out h_t + b_out where d_hidden differs from D

    dt_t is the time since the previous step, `context.timespans`, 1 by default. Every row is integrated over its own
    time, as dt_t f over s in [0, 1]. The update is torch.nn.GRUCell's, with its names and init; f starts as published:
    weights normal with std 0.1, biases zero.

    The fixed-step solvers take `substeps` equal steps in every interval, with the formulas of torchdiffeq, written out
    here because that package cannot be traced, and its checks cannot be switched off. `adjoint` and dopri5 are
    torchdiffeq's own.

    | state | cost per token                        | parallel form | cannot                                           |
    |-------|---------------------------------------|---------------|--------------------------------------------------|
    | H     | 16 evaluations of f, then 6 H (D + H) | none          | resolve what is faster than a step, skip a step  |

    with H = d_hidden; an evaluation of the default f costs 4 H^2.

    dopri5 chooses the steps of a whole batch by its worst row, which couples rows within its tolerance.

    The recurrence runs in float32 at least, under autocast too: rounding feeds back at every step.
    """

    traits = Traits(reads_timespans=True)

    class Config(Options):
        """The options.

        Attributes:
            d_hidden: width of the state, D by default; any other width is projected back to D.
            f_units: width of f's inner layers, d_hidden by default.
            f_layers: number of these layers.
            solver: "rk4" (of order 4, the 3/8 rule), "midpoint" (2) and "euler" (1) take fixed steps, "dopri5" (5)
                adaptive ones.
            substeps: fixed steps in each interval.
            rtol: relative error that dopri5 allows itself in a step.
            atol: absolute error, added to it.
            adjoint: gradients by solving the adjoint equation backwards, in memory that does not grow with the steps,
                and as exact as the solver is.
        """

        d_hidden: int | None = Field(default=None, ge=1)
        f_units: int | None = Field(default=None, ge=1)
        f_layers: int = Field(default=1, ge=0, le=1024)
        solver: Literal["rk4", "midpoint", "euler", "dopri5"] = "rk4"
        substeps: int = Field(default=4, ge=1, le=1024)
        rtol: float = Field(default=1e-6, gt=0)
        atol: float = Field(default=1e-7, gt=0)
        adjoint: bool = False

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        fixed = c.solver in FIXED
        for name in ("rtol", "atol") if fixed else ("substeps",):
            if name in c.changed():
                raise UsageError(f"neural_ode: {name} has no effect with solver={c.solver!r}.")
        if not fixed or c.adjoint:
            library()
            why = "torchdiffeq checks its inputs by value, and adaptive steps depend on the data."
            self.traits = self.traits._replace(not_compilable=why)
        if not fixed:
            self.traits = self.traits._replace(couples_rows="dopri5 chooses the steps of a batch by its worst row.")
        self.d_hidden = c.d_hidden or d_model
        width = c.f_units or self.d_hidden
        self.widths = [self.d_hidden, *c.f_layers * [width], self.d_hidden]
        self.f = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(self.widths))
        for p in self.f.parameters():
            nn.init.normal_(p, std=0.1) if p.ndim == 2 else nn.init.zeros_(p)
        self.cell = nn.GRUCell(d_model, self.d_hidden)
        self.fc = nn.Linear(self.d_hidden, d_model) if self.d_hidden != d_model else None

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> NeuralODEState:
        device, dtype = first_parameter_like(self, device, dtype)
        return NeuralODEState(torch.zeros(batch_size, self.d_hidden, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        h, last = self._loop(precise(x), state.h, context or Context())
        h = h.to(x.dtype)
        return h if self.fc is None else self.fc(h), NeuralODEState(last)

    @without_autocast
    def _loop(self, x: Tensor, h: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """All steps; only the input's part of the gates is taken for all at once."""
        valid, resets, spans = None, context.resets, context.timespans
        if context.lengths is not None:
            valid = valid_steps(context.lengths, x.shape[1])
            x, resets = blank(x, ~valid), None if resets is None else resets & valid
        spans = None if spans is None else (spans if valid is None else blank(spans, ~valid)).to(x.dtype)
        f, weights = Drift(self.f), None
        if bare(self.cell, cls=nn.GRUCell):
            weights = [precise(p) for p in self.cell.parameters()]
            gates = F.linear(x, weights[0], weights[2])
        steps = []
        for t in range(x.shape[1]):
            if resets is not None:
                h = blank(h, resets[:, t])
            new = self._integrate(f, h, 1.0 if spans is None else spans[:, t, None])
            if weights is None:
                new = precise(narrowly(self.cell, x[:, t], new))
            else:
                r_x, z_x, n_x = gates[:, t].chunk(3, 1)
                r_h, z_h, n_h = F.linear(new, weights[1], weights[3]).chunk(3, 1)
                new = torch.lerp(torch.addcmul(n_x, (r_x + r_h).sigmoid(), n_h).tanh(), new, (z_x + z_h).sigmoid())
            h, new = (new, new) if valid is None else (torch.where(valid[:, t, None], new, h), blank(new, ~valid[:, t]))
            steps.append(new)
        return torch.stack(steps, 1), h

    def _integrate(self, f: Drift, h: Tensor, span: Tensor | float) -> Tensor:
        """h after a time `span`, one for all rows or (B, 1)."""
        c = self.config
        if c.solver in FIXED and not c.adjoint:
            dt = span / c.substeps
            for _ in range(c.substeps):
                h = h + dt * increment(f, h, dt, c.solver)
            return h
        unit = torch.linspace(0, 1, c.substeps + 1, dtype=h.dtype, device=h.device)
        options = {"grid_constructor": lambda f, h, s: s[0] + (s[-1] - s[0]) * unit} if c.solver in FIXED else None
        given = {"method": c.solver, "options": options, "rtol": c.rtol, "atol": c.atol}
        if transformed():
            raise UsageError(LIBRARY)
        if not c.adjoint:
            return library().odeint(lambda s, h: span * f(h), h, unit[[0, -1]], **given)[1]
        times = (span,) if isinstance(span, Tensor) else ()
        after = library().odeint_adjoint(
            lambda s, h: span * f(h), h, unit[[0, -1]], adjoint_params=(*f.parameters, *times), **given
        )[1]
        return once_only(after, ADJOINT)

    def flops_per_token(self, context_length: int) -> int:
        f = 2 * sum(a * b for a, b in pairwise(self.widths))
        cell = 6 * self.d_hidden * (self.d_model + self.d_hidden)
        steps = self.config.substeps if self.config.solver in FIXED else 1
        out = 0 if self.fc is None else 2 * self.d_hidden * self.d_model
        return steps * EVALUATIONS[self.config.solver] * f + cell + out

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        cases: list[dict[str, Any]] = [
            {"substeps": 1},  # the default but for a quarter of its evaluations
            {"d_hidden": 24, "f_units": 20, "f_layers": 2, "solver": "midpoint", "substeps": 2},
        ]
        if importlib.util.find_spec("torchdiffeq") is not None:
            cases += [
                {"f_layers": 0, "solver": "euler", "substeps": 2, "adjoint": True},
                {"d_hidden": 16, "solver": "dopri5", "rtol": 1e-7, "atol": 1e-8},
            ]
        return cases


def library() -> Any:
    """torchdiffeq, which solves by dopri5 and by the adjoint equation.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import torchdiffeq
    except ImportError:
        told = 'pip install "sequence-zoo[ode]", or take a fixed-step solver without adjoint'
        raise UsageError(
            f"neural_ode: adjoint=True and solver='dopri5' need the package torchdiffeq: {told}."
        ) from None
    return torchdiffeq


class Drift:
    """f, with `parameters` that it depends on: weights and biases in turn where nothing is attached to its layers."""

    def __init__(self, layers: nn.ModuleList):
        self.layers: list[Any] = list(layers)
        self.parameters: list[Tensor] = list(layers.parameters())
        self.bare = bare(*self.layers)
        if self.bare:
            self.parameters = [precise(p) for p in self.parameters]
            self.layers = list(zip(self.parameters[::2], self.parameters[1::2], strict=True))

    def __call__(self, h: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            h = self._map(layer, h).tanh()
        return self._map(last, h)

    def _map(self, layer: Any, h: Tensor) -> Tensor:
        return F.linear(h, *layer) if self.bare else widely(layer, h)


def increment(f: Drift, h: Tensor, dt: Tensor | float, solver: str) -> Tensor:
    """(h(t + dt) - h(t)) / dt, as a fixed-step solver has it."""
    k1 = f(h)
    if solver == "euler":
        return k1
    if solver == "midpoint":
        return f(h + 0.5 * dt * k1)
    k2 = f(h + dt * k1 / 3)
    k3 = f(h + dt * (k2 - k1 / 3))
    k4 = f(h + dt * (k1 - k2 + k3))
    return (k1 + 3 * (k2 + k3) + k4) / 8
