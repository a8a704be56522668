"""S5: a state space of many inputs and outputs with a diagonal transition, in continuous time."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.mixers._state_space import (
    COMPLEX,
    Activation,
    ActivationName,
    as_complex,
    as_pairs,
    driven,
    interleaved,
    known_spans,
    log_uniform,
)
from zoo.mixers.parts import Backend, check_range
from zoo.ops import scan
from zoo.ops.common import widest
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register

LEAST_DECAY = 1e-4
"""Real parts stay below minus this with `clip_eigs`, as in the authors' code."""


class S5State(NamedTuple):
    h: Tensor  # (B, 2 P), pairs (re, im)


@register("s5")
class S5(Mixer):
    """S5: one linear state space for all channels, in continuous time (Smith et al. 2022, arXiv 2208.04933).

    Sections 3 and 4 of the paper:

        dh/dt = Lambda h + B x ;  y = Re(C h) + D x ;  out = g sigmoid(W_2 g + b_2) with g = gelu(y)
        h_t = e^z h_{t-1} + (e^z - 1) / Lambda (B x_t),  z = Lambda Delta_t                  (discretization "zoh")
        h_t = (1 + z / 2) / (1 - z / 2) h_{t-1} + Delta_t / (1 - z / 2) (B x_t)              ("bilinear")

    with Delta_t = exp(log_step) dt_t for each state, where dt_t is the time since the previous step,
    `context.timespans`, 1 by default. Lambda starts at the eigenvalues of the HiPPO-N matrix, in `n_blocks` blocks, and
    B and C in its eigenvectors' basis: V^H B and C V with B normal of variance 1 / d_state and each part of C too (the
    authors cut off the normal's tails). The d_state eigenvalues come in conjugate pairs, of which `conj_sym` keeps one
    each: P = d_state / 2 complex numbers of state.

    | state | cost per token   | parallel form | cannot                                                       |
    |-------|------------------|---------------|--------------------------------------------------------------|
    | 2 P   | 8 D P + 2 D^2    | a scan        | choose by content what to keep: its decays read no input     |

    The recurrence runs in float32 at least. `in_proj` has B's real and imaginary rows in turn, `out_proj` the columns
    of Re C and -Im C in turn, twice that with `conj_sym`.
    """

    traits = Traits(reads_timespans=True, cuts_in_ops=True)

    class Config(Options):
        """The options.

        Attributes:
            d_state: eigenvalues of the state space, by default D.
            n_blocks: blocks of the matrix from which Lambda starts; the more, the shorter its memories.
            discretization: how a step of the differential equation is taken: "zoh" holds the input, "bilinear" is
                Tustin's rule.
            conj_sym: keep one of each conjugate pair of states; otherwise all d_state are learned apart.
            clip_eigs: keep the real parts of Lambda below -1e-4, so that states cannot grow without end. The authors
                advise it for generation and long sequences; their default is off.
            dt_init_range: step sizes exp(log_step) start log-uniform between these.
            activation: what follows the recurrence: "half_glu1" is the authors' default, None the bare recurrence,
                for a channel mixer behind it.
            backend: form of the op.
        """

        d_state: int | None = Field(default=None, ge=1, le=8192)
        n_blocks: int = Field(default=1, ge=1)
        discretization: Literal["zoh", "bilinear"] = "zoh"
        conj_sym: bool = True
        clip_eigs: bool = True
        dt_init_range: tuple[float, float] = (1e-3, 1e-1)
        activation: ActivationName | None = "half_glu1"
        backend: Backend = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c, size = config, config.d_state or d_model
        check_range(self.name, "dt_init_range", c.dt_init_range)
        if size % c.n_blocks:
            raise UsageError(f"s5: n_blocks={c.n_blocks} does not divide d_state={size}.")
        block = size // c.n_blocks
        if c.conj_sym and block % 2:
            given = f"d_state={size} in n_blocks={c.n_blocks} blocks"
            raise UsageError(f"s5: {given} is odd: conj_sym needs an even number in each, or take conj_sym=False.")
        self.d_state = size // (2 if c.conj_sym else 1)  # P
        self.in_proj = nn.Linear(d_model, 2 * self.d_state, bias=False)
        self.out_proj = nn.Linear(2 * self.d_state, d_model, bias=False)
        self.Lambda_re = nn.Parameter(torch.empty(self.d_state))
        self.Lambda_im = nn.Parameter(torch.empty(self.d_state))
        self.log_step = nn.Parameter(log_uniform(self.d_state, *c.dt_init_range))
        self.D = nn.Parameter(torch.randn(d_model))
        self.activation = Activation(d_model, c.activation)
        if not self.D.is_meta:
            self._start(size, block)

    @torch.no_grad()
    def _start(self, size: int, block: int) -> None:
        """Lambda, B and C in the eigenvectors' basis of the block-diagonal HiPPO-N matrix."""
        c, kept = self.config, block // 2 if self.config.conj_sym else block
        values, vectors = (x.to(self.D.device) for x in hippo_normal(block))
        values, vectors = values[:kept], vectors[:, :kept].to(torch.complex64)
        self.Lambda_re.copy_(values.real.repeat(c.n_blocks))
        self.Lambda_im.copy_(values.imag.repeat(c.n_blocks))
        B = torch.randn(c.n_blocks, block, self.d_model, dtype=torch.float32) * size**-0.5
        C = torch.randn(2, self.d_model, c.n_blocks, block, dtype=torch.float32) * size**-0.5
        self.in_proj.weight.copy_(interleaved((vectors.mH @ B.to(vectors.dtype)).flatten(0, 1)))
        C = (torch.complex(C[0], C[1]) @ vectors).flatten(1)
        self.out_proj.weight.copy_(interleaved(C.conj().mT * (2 if c.conj_sym else 1)).mT)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> S5State:
        device, dtype = first_parameter_like(self, device, dtype)
        return S5State(torch.zeros(batch_size, 2 * self.d_state, device=device, dtype=recurrent_dtype(dtype)))

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        decay, factor = self._discretized(known_spans(context, x.shape[1], widest(x.device)))
        before = None if state is None else as_complex(state.h)
        u = driven(x, self.in_proj, factor)
        h, last = scan(decay, u, before, backend=self.config.backend, **packing(context))
        y = torch.addcmul(self.out_proj(as_pairs(h).to(x.dtype)), x, self.D)
        return self.activation(y), S5State(as_pairs(last))

    def _discretized(self, spans: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a step keeps of the state, and by what it multiplies B x: (P), or (B, T, P) where times are given.

        Products are in float64 where there is one: at a rate of 100 the rounding of an angle would add up.
        """
        wide, dtype = widest(self.D.device), recurrent_dtype(self.D.dtype)
        re, im, step = self.Lambda_re.to(wide), self.Lambda_im.to(wide), self.log_step.to(wide).exp()
        re = re.clamp(max=-LEAST_DECAY) if self.config.clip_eigs else re
        if spans is not None:
            step = step * spans
        x, angle, eigenvalue = re * step, im * step, torch.complex(re, im)
        if spans is not None:  # of many steps, functions in float32
            if self.config.discretization == "zoh":
                angle = angle - 2 * math.pi * (angle.detach() / (2 * math.pi)).round()
            x, angle, step, eigenvalue = x.to(dtype), angle.to(dtype), step.to(dtype), eigenvalue.to(COMPLEX[dtype])
        if self.config.discretization == "bilinear":
            half = 0.5 * torch.complex(x, angle)
            decay, factor = (1 + half) / (1 - half), step / (1 - half)
        else:
            # exp(z) - 1 without cancellation: steps are short
            less = torch.expm1(x) * angle.cos() - 2 * (0.5 * angle).sin().square()
            modulus = x.exp()
            decay = torch.polar(modulus, angle)
            factor = torch.complex(less, modulus * angle.sin()) / eigenvalue
        return decay.to(COMPLEX[dtype]), factor.to(COMPLEX[dtype])

    def flops_per_token(self, context_length: int) -> int:
        return 8 * self.d_model * self.d_state + self.activation.flops(self.d_model)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"d_state": 12, "n_blocks": 3, "discretization": "bilinear", "dt_init_range": (0.1, 0.5)}
            | {"activation": None, "backend": "reference"},
            {"d_state": 5, "conj_sym": False, "clip_eigs": False, "activation": "half_glu2", "backend": "chunked"},
        ]


@functools.cache
def hippo_normal(n: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n), those of negative imaginary part first, and unit eigenvectors (n, n) of the HiPPO-N matrix.

    It is the normal part of HiPPO-LegS (Gu et al. 2020): -1/2 on the diagonal, and -+ sqrt(i + 1/2) sqrt(j + 1/2) below
    and above it.
    """
    root = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    skew = torch.outer(root, root)
    skew = skew.triu(1) - skew.tril(-1)
    imaginary, vectors = torch.linalg.eigh(-1j * skew)
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary), vectors
