"""How the steps of a model read its residual stream and write to it, token by token.

A step reads h (B, T, D) from the stream and adds its result y (B, T, D). With one stream, h = x, and x + y is the next
one; a residual kind may have a stream of another form, several that mix for one. A kind of one's own is a file that
`ZOO_IMPORT` names: a subclass of `Connection` under `@zoo.residual.register("my_kind")`, after which
`model.residual=my_kind` and `model.residual="my_kind(option=1)"` are valid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from zoo.core.options import Options, unfrozen
from zoo.core.registry import Registry
from zoo.pattern.named import read_named


class Connection(nn.Module, ABC):
    """A residual kind, and the residual operator of one step; its options are a nested frozen `Config(Options)`.

    Args:
        d_model: D.
        config: its options.
        index: number of the step in its model.
        eps: `norm_eps` of the model.
    """

    class Config(Options):
        """None."""

    name: ClassVar[str]

    def __init__(self, d_model: int, config: Any, *, index: int, eps: float):
        super().__init__()
        self.d_model, self.index, self.eps = d_model, index, eps
        self.config: Any = config  # of the subclass's own Config

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        """Sets of options for the laws: the defaults, and every option with another value at least once."""
        return [{}]

    @classmethod
    def widen(cls, x: Tensor, config: Any) -> Tensor:
        """The stream that x (B, T, D) starts: by default itself."""
        return x

    @classmethod
    def narrow(cls, stream: Tensor, config: Any) -> Tensor:
        """The stream as one (B, T, D), for the norm before the head: by default itself."""
        return stream

    @abstractmethod
    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The stream to (h (B, T, D), the stream without what the step adds, what `write` needs)."""

    @abstractmethod
    def write(self, stream: Tensor, y: Tensor, weights: Any) -> Tensor:
        """The stream with a step's output y (B, T, D) added, from the last two results of `forward`."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Matmul FLOPs, multiply-add = 2."""


residuals: Registry[type[Connection]] = Registry(
    "residual kind", "zoo.residual", base=Connection, check=lambda cls: unfrozen(cls.Config)
)
register = residuals.register
"""Class decorator `@register("name")`."""

ResidualText = Annotated[str, BeforeValidator(lambda value: read_named(residuals, value).text)]
"""A residual kind, with its options if it has any."""


class Residual(NamedTuple):
    """The residual kind of a model, and its options."""

    kind: type[Connection]
    config: Options

    @classmethod
    def of(cls, spec: str | Mapping[str, Any]) -> Residual:
        """The one that a text such as `mhc(streams=3)`, or a mapping with the key `name`, stands for.

        Raises:
            UsageError: an unknown kind or option.
        """
        name, config = read_named(residuals, spec)
        return cls(residuals[name], config)

    def connections(self, d_model: int, eps: float) -> Iterator[Connection]:
        """The operators of a model's steps, in order."""
        index = 0
        while True:
            yield self.kind(d_model, self.config, index=index, eps=eps)
            index += 1

    def streams(self, d_model: int) -> int:
        """The number of residual streams."""
        return self.widen(torch.empty(1, 1, d_model, device="meta")).numel() // d_model

    def widen(self, x: Tensor) -> Tensor:
        """The stream that x (B, T, D) starts."""
        return self.kind.widen(x, self.config)

    def narrow(self, stream: Tensor) -> Tensor:
        """The stream as one (B, T, D)."""
        return self.kind.narrow(stream, self.config)
