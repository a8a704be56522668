"""Norms and residual kinds under the laws: each in a mixer over channels, which no other step and no other row reaches.

So the laws of mixers judge them too: a norm that reads another step breaks law 1, one that reads another row law 3.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.laws.compare import assert_close, dtype_of, random_like, require
from zoo.norms import NORM_EPS
from zoo.pattern.named import Named
from zoo.protocol import Context, Mixer, Norm, Place
from zoo.residual import Connection

LAWS_OF_NORMS = (
    *(
        "contract",
        "law cases",
        "chunk consistency",
        "batch independence",
        "purity",
        "cost",
        "gradients",
        "compilation",
        "autocast",
    ),
    *("any size", "hooks", "adapters", "pruning", "checkpointing", "second derivatives", "transforms"),
)
LAWS_OF_RESIDUALS = (*LAWS_OF_NORMS, "flops")
B, T = 2, 3


class StandIn(Mixer):
    """A mixer over channels that is made of a norm or of a residual kind."""

    kind = "channel"
    of: ClassVar[type]
    """The norm, or the residual kind."""
    laws: ClassVar[tuple[str, ...]]
    """The names of the laws that bind it."""

    @abstractmethod
    def check_form(self) -> None:
        """Raises LawBroken unless all that is given back has the right shape and dtype."""

    @classmethod
    def text(cls, options: dict[str, Any]) -> str:
        """The name with options."""
        return Named(cls.name, cls.Config(**options)).text

    def init_state(self, batch_size: int, *, capacity: int | None = None, device: Any = None, dtype: Any = None) -> Any:
        return ()


def stand_in_class(cls: type[Norm] | type[Connection]) -> type[StandIn]:
    """The mixer class that stands for a norm or for a residual kind."""
    return _of_norm(cls) if issubclass(cls, Norm) else _of_residual(cls)


def stand_in(thing: Norm | Connection) -> StandIn:
    """A mixer for a built norm, or for the residual operator of a step, of the same width and options."""
    return stand_in_class(type(thing))(thing.d_model, thing.config)


@functools.cache
def _of_norm(cls: type[Norm]) -> type[StandIn]:
    class OfNorm(StandIn):
        name = cls.name
        Config = cls.Config
        of = cls
        laws = LAWS_OF_NORMS
        law_cases = cls.law_cases  # type: ignore[assignment]

        def __init__(self, d_model: int, config: Options, *, place: Place = Place()):
            super().__init__(d_model, config, place=place)
            self.gain = nn.Parameter(torch.ones(d_model))  # for norms without weights: laws go by those of parameters
            self.norm = cls(d_model, config, eps=NORM_EPS)

        def forward(self, x: Tensor, state: Any = None, context: Context | None = None) -> tuple[Tensor, Any]:
            return self.norm(x * self.gain), ()

        def flops_per_token(self, context_length: int) -> int:
            return 0

        def check_form(self) -> None:
            x, D = random_like(self, B, T, self.d_model).to(dtype_of(self)), self.d_model
            y = _required("forward", self.norm(x), x)
            require(
                bool(self.norm(torch.zeros_like(x)).isfinite().all()),
                "the norm of zeros, such as padding, is not finite",
            )
            streams = random_like(self, B, T, 2, D).to(x)
            each = _required("forward, of several streams,", self.norm(streams), streams)
            for i in range(2):
                assert_close(each[:, :, i], self.norm(streams[:, :, i]), 1e-2, "one stream of several")
            if "time" in cls.axes:
                with x.device:  # laws build what is made without a device on another one
                    norm = cls(D, self.config, eps=NORM_EPS, axis="time").to(x)
                y = _required('forward, along axis="time",', norm(x), x)
                assert_close(y[:1], norm(x[:1]), 1e-2, 'one row alone, along axis="time"')
                half = torch.cat([x[..., : D // 2], torch.zeros_like(x[..., D // 2 :])], -1)
                found = norm(half)[..., : D // 2]
                assert_close(found, y[..., : D // 2], 1e-2, 'channels beside others, along axis="time"')

    return OfNorm


@functools.cache
def _of_residual(cls: type[Connection]) -> type[StandIn]:
    class OfResidual(StandIn):
        """Two steps around a linear layer each."""

        name = cls.name
        Config = cls.Config
        of = cls
        laws = LAWS_OF_RESIDUALS
        law_cases = cls.law_cases  # type: ignore[assignment]

        def __init__(self, d_model: int, config: Options, *, place: Place = Place()):
            super().__init__(d_model, config, place=place)
            self.connections: Any = nn.ModuleList(cls(d_model, config, index=i, eps=NORM_EPS) for i in range(2))
            self.layers = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(2))

        def forward(self, x: Tensor, state: Any = None, context: Context | None = None) -> tuple[Tensor, Any]:
            stream = cls.widen(x, self.config)
            for connection, layer in zip(self.connections, self.layers, strict=True):
                h, stream, weights = connection(stream)
                stream = connection.write(stream, torch.tanh(layer(h)), weights)
            return cls.narrow(stream, self.config), ()

        def flops_per_token(self, context_length: int) -> int:
            return sum(c.flops_per_token() for c in self.connections) + 4 * self.d_model**2

        def check_form(self) -> None:
            x = random_like(self, B, T, self.d_model).to(dtype_of(self))
            stream: Any = cls.widen(x, self.config)
            require(isinstance(stream, Tensor), f"widen returns a {type(stream).__name__}, expected a tensor")
            for connection in self.connections:
                result = connection(stream)
                three = isinstance(result, tuple) and len(result) == 3
                require(three, "forward does not return (h, the stream without the step's output, what write needs)")
                h, kept, weights = result
                _required("forward, as h,", h, x)
                stream = _required("write", connection.write(kept, h, weights), stream)
                flops = connection.flops_per_token()
                right = type(flops) is int and flops >= 0
                require(right, f"flops_per_token returns {flops!r:.40}, expected a whole number from 0")
            _required("narrow", cls.narrow(stream, self.config), x)

    return OfResidual


def _required(what: str, found: Any, like: Tensor) -> Tensor:
    """The tensor that was found, of a shape and dtype as another."""
    forms = [
        f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
        for t in (found, like)
    ]
    require(forms[0] == forms[1], f"{what} returns {forms[0]}, expected {forms[1]}")
    return found
