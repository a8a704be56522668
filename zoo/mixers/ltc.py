"""The liquid time-constant network."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers._wirings import WIRINGS, WiringOptions, make_wiring, units_of
from zoo.mixers.parts import precise
from zoo.ops import Synapses, ltc
from zoo.ops.common import blank, valid_steps
from zoo.ops.derivatives import differentiated, transformed
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register

RANGES = {
    "gleak": (0.001, 1.0),
    "vleak": (-0.2, 0.2),
    "cm": (0.4, 0.6),
    "w": (0.001, 1.0),
    "sigma": (3, 8),
    "mu": (0.3, 0.8),
}


class LTCState(NamedTuple):
    v: Tensor  # (B, d_hidden), membrane potentials


@register("ltc")
class LTC(Mixer):
    """LTC, a liquid network of neurons with conductance-based synapses (Hasani et al. 2021, arXiv 2006.04439,
    equations 1 to 3).

        cm dv/dt = gleak (vleak - v) + sum_p w_p sigmoid(sigma_p (u_p - mu_p)) (erev_p - v)
        u = the inputs input_w * x_t + input_b, and the neurons v ;  y_t = W_out (output_w * v_motor + output_b)

    over dt_t = `context.timespans` (1 by default), in `unfolds` steps of the paper's fused solver. A neuron's time
    constant, cm / (gleak + sum w sigmoid), changes with what it receives. Parameters, names and ranges of inits are
    those of the authors' package ncps; erev starts at the sign of the wiring's synapse.

    | state | cost per token                   | parallel form | cannot                                               |
    |-------|----------------------------------|---------------|------------------------------------------------------|
    | N     | N (D + unfolds N) synapses open  | none          | leave the range that erev and vleak span, skip a step |

    with N = d_hidden neurons. Each synapse costs a sigmoid and 4 FLOPs of sums, so the cell is expensive.

    The recurrence runs in float32 at least, under autocast too: rounding feeds back at every step.
    """

    traits = Traits(reads_timespans=True)

    class Config(WiringOptions):
        """The options, besides those of the wiring.

        Attributes:
            unfolds: solver steps in every time step.
            epsilon: keeps the solver's denominator from zero, and cm with positivity="clip".
            positivity: what keeps w, cm and gleak positive: "softplus" of the parameter, or "clip": below zero it
                counts as zero, while its gradient still reaches it, so that no synapse is dead for good.
            input_mapping: map of the inputs before the synapses.
            output_mapping: map of the motor neurons at the output.
            wiring: how neurons are connected.
            backend: "reference" is one step at a time, "compiled" a C++ loop; "auto" takes the faster that runs.
        """

        unfolds: int = Field(default=6, ge=1, le=1024)
        epsilon: float = Field(default=1e-8, ge=0)
        positivity: Literal["softplus", "clip"] = "softplus"
        input_mapping: Literal["affine", "linear"] | None = "affine"
        output_mapping: Literal["affine", "linear"] | None = "affine"
        wiring: WIRINGS = "fully_connected"
        backend: Literal["auto", "reference", "compiled"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.d_hidden = units_of(self.name, c.wiring, c, d_model)
        wiring = make_wiring(self.name, c.wiring, c, d_model, self.d_hidden)
        self.n_motor = wiring.n_motor

        def drawn(name: str, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(*RANGES[name]))

        self.gleak, self.vleak, self.cm = (drawn(name, self.d_hidden) for name in ("gleak", "vleak", "cm"))
        for prefix, signs in (("", wiring.inner), ("sensory_", wiring.sensory)):
            for name in ("sigma", "mu", "w"):
                setattr(self, prefix + name, drawn(name, *signs.shape))
            erev = torch.as_tensor(signs, dtype=self.cm.dtype)
            setattr(self, prefix + "erev", nn.Parameter(erev))
            self.register_buffer(prefix + "sparsity_mask", erev.abs())
        if c.input_mapping:
            self.input_w = nn.Parameter(torch.ones(d_model))
        if c.input_mapping == "affine":
            self.input_b = nn.Parameter(torch.zeros(d_model))
        if c.output_mapping:
            self.output_w = nn.Parameter(torch.ones(self.n_motor))
        if c.output_mapping == "affine":
            self.output_b = nn.Parameter(torch.zeros(self.n_motor))
        self.fc = nn.Linear(self.n_motor, d_model) if self.n_motor != d_model else None

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> LTCState:
        device, dtype = first_parameter_like(self, device, dtype)
        return LTCState(torch.zeros(batch_size, self.d_hidden, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c, u = self.config, precise(x)
        padding = None
        if context is not None and context.lengths is not None:
            padding = ~valid_steps(context.lengths, x.shape[1])
            u = blank(u, padding)
        if c.input_mapping:
            u = u * self.input_w
        if c.input_mapping == "affine":
            u = u + self.input_b
        v, last = ltc(
            u,
            self._synapses("sensory_"),
            self._synapses(""),
            self._positive(self.gleak),
            precise(self.vleak),
            self._positive(self.cm, c.epsilon),
            None if state is None else state.v,
            unfolds=c.unfolds,
            epsilon=c.epsilon,
            timespans=None if context is None else context.timespans,
            backend=c.backend,
            **packing(context),
        )
        y = v[..., : self.n_motor]
        if c.output_mapping:
            y = y * self.output_w
        if c.output_mapping == "affine":
            y = y + self.output_b
        y = y.to(x.dtype)
        return y if self.fc is None else self.fc(y), LTCState(last)

    def _synapses(self, prefix: str) -> Synapses:
        mu, sigma, w, erev, mask = (getattr(self, prefix + n) for n in ("mu", "sigma", "w", "erev", "sparsity_mask"))
        return Synapses(*(precise(p) for p in (mu, sigma, self._positive(w) * mask, erev)))

    def _positive(self, p: Tensor, least: float = 0.0) -> Tensor:
        if self.config.positivity == "softplus":
            return F.softplus(precise(p))
        if transformed():
            raise UsageError(NO_SLOPE.format("forward mode and no torch.func"))
        return _Clip.apply(precise(p), least)

    def flops_per_token(self, context_length: int) -> int:
        synapses = self.d_hidden * (self.d_model + self.config.unfolds * self.d_hidden)
        return 4 * synapses + (0 if self.fc is None else 2 * self.n_motor * self.d_model)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"positivity": "clip", "unfolds": 3, "epsilon": 1e-6, "wiring": "auto_ncp", "sparsity": 0.4, "n_motor": 5},
            {"d_hidden": 20, "wiring": "random", "input_mapping": None, "output_mapping": "linear"},
            {
                "wiring": "ncp",
                "ncp_neurons": (9, 6, 4),
                "ncp_synapses": (3, 2, 5, 3),
                "wiring_seed": 3,
                "input_mapping": "linear",
                "output_mapping": None,
                "backend": "reference",
            },
        ]


NO_SLOPE = "ltc: positivity='clip' passes gradients on where it clips, so they have no {}; take positivity='softplus'."


class _Clip(torch.autograd.Function):
    """max(p, least), with the gradient of p: a parameter below can come back."""

    @staticmethod
    def forward(p: Tensor, least: float) -> Tensor:
        return p.clamp(min=least)

    @staticmethod
    def setup_context(ctx, inputs, output):
        p, ctx.least = inputs
        ctx.save_for_backward(p)

    @staticmethod
    def backward(ctx, d: Tensor):
        (p,) = ctx.saved_tensors
        if differentiated() and (p < ctx.least).any():
            raise UsageError(NO_SLOPE.format("second derivatives"))
        return d, None
