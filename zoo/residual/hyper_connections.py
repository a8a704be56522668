"""Several residual streams that mix.

Hyper-connections widen the stream to H (B, T, n, D), n copies at first; every step has weights for what it reads, for
how the streams mix, and for what it writes to each of them:

    h = sum_i read_i H_i        H'_j = sum_i mixing_ij H_i + write_j y
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.options import Options
from zoo.ops.common import without_autocast
from zoo.parameters import set_rule
from zoo.protocol import recurrent_dtype
from zoo.residual.connection import Connection, register

SMALL = 0.01
"""The first factor on the part of the weights that depends on the token."""
SINKHORN_STEPS = 20
FAR = -4.0
"""The first logit of the weight between two streams, against 0 for that of a stream with itself."""


class Streams(Connection):
    """Several streams (B, T, n, D) with the weights that a subclass makes."""

    class Config(Options):
        """The options.

        Attributes:
            streams: n.
            dynamic: whether the weights depend on the token.
        """

        streams: int = Field(default=4, ge=2)
        dynamic: bool = True

    def __init__(self, d_model: int, config: Any, *, index: int, eps: float):
        super().__init__(d_model, config, index=index, eps=eps)
        self.n_streams = config.streams

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [{}, {"streams": 3, "dynamic": False}]

    @classmethod
    def widen(cls, x: Tensor, config: Any) -> Tensor:
        return x[..., None, :].expand(*x.shape[:-1], config.streams, x.shape[-1])

    @classmethod
    def narrow(cls, stream: Tensor, config: Any) -> Tensor:
        """The mean of the streams.

        The papers take the sum, which is the same under the norm before the head; the mean also starts models without
        that norm as those of one stream.
        """
        return stream.mean(-2)

    @abstractmethod
    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (..., n, 1 + n), from each stream to h and to every stream, and (..., n), of y to every stream."""

    @abstractmethod
    def projection_flops(self) -> int:
        """Matmul FLOPs of `weights`."""

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixing, write = self.weights(stream)
        mixed = _mixed(mixing.to(stream.dtype), stream)
        return mixed[..., 0, :], mixed[..., 1:, :], write.to(stream.dtype)

    def write(self, stream: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return stream + weights[..., None] * y[..., None, :]

    def flops_per_token(self) -> int:
        return self.projection_flops() + 2 * self.n_streams * (1 + self.n_streams) * self.d_model


@final
@register("hyper_connections")
class HyperConnections(Streams):
    """Hyper-connections: several residual streams, mixed by learned weights (Zhu et al. 2024, arXiv 2409.19606).

    weights = static + scale * tanh(W rms_norm(H_i)) for each stream i, with W zero and the scales 0.01 at first, when
    step k reads stream k mod n, the streams keep apart and all are written to alike: then the network is that of one
    stream. The static weights are not decayed.
    """

    def __init__(self, d_model: int, config: Any, *, index: int, eps: float):
        super().__init__(d_model, config, index=index, eps=eps)
        n_streams = self.n_streams
        read = F.one_hot(torch.tensor([index % n_streams], device="cpu"), n_streams).T
        static = torch.cat([read, torch.eye(n_streams, device="cpu"), torch.ones(n_streams, 1, device="cpu")], 1)
        self.static = _parameter(static)
        set_rule(self, "static", weight_decay=False)
        self.weight = nn.Parameter(torch.zeros(n_streams + 2, d_model)) if config.dynamic else None
        self.scale = nn.Parameter(torch.full((2,), SMALL)) if config.dynamic else None

    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        found: Tensor = self.static.clone()  # a module gives no view of its own parameter
        if self.weight is not None and self.scale is not None:
            from_token = torch.tanh(F.linear(F.rms_norm(streams, streams.shape[-1:], eps=self.eps), self.weight))
            mixing, writing = self.scale.unbind()
            found = found + torch.cat([mixing.expand(self.n_streams + 1), writing[None]]) * from_token
        return found[..., :-1], found[..., -1]

    def projection_flops(self) -> int:
        return 0 if self.weight is None else 2 * self.n_streams * self.weight.numel()


@final
@register("mhc")
class ManifoldHyperConnections(Streams):
    """mHC: several residual streams, mixed by doubly stochastic matrices (Xie et al. 2025, arXiv 2512.24880).

    logits = bias + scale * W rms_norm([H_1 ... H_n]); read = sigmoid, write = 2 sigmoid, and the mixing is doubly
    stochastic by 20 steps of Sinkhorn and Knopp, so that no product of layers grows. The paper leaves the biases open:
    here step k reads mostly stream k mod n, with weights that sum to one, the streams mix little, and all are written
    to alike, so that the network is that of one stream at first.
    """

    def __init__(self, d_model: int, config: Any, *, index: int, eps: float):
        super().__init__(d_model, config, index=index, eps=eps)
        n_streams = self.n_streams
        far = FAR * (1 - torch.eye(n_streams, device="cpu"))
        read = torch.logit(far.softmax(-1)[index % n_streams])
        self.bias = _parameter(torch.cat([read, torch.zeros(n_streams, device="cpu"), far.flatten()]))
        set_rule(self, "bias", weight_decay=False)
        self.weight = nn.Parameter(torch.zeros(len(self.bias), n_streams * d_model)) if config.dynamic else None
        self.scale = nn.Parameter(torch.full((3,), SMALL)) if config.dynamic else None

    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        n = self.n_streams
        logits = self.bias.to(recurrent_dtype(self.bias.dtype))
        if self.weight is not None and self.scale is not None:
            flat = streams.flatten(-2)
            from_token = F.linear(F.rms_norm(flat, flat.shape[-1:], eps=self.eps), self.weight)
            scale = torch.cat([s.expand(k) for s, k in zip(self.scale.unbind(), (n, n, n * n), strict=True)])
            logits = logits + scale * from_token
        read, write, mixing = logits.split((n, n, n * n), -1)
        doubly_stochastic = sinkhorn(mixing.unflatten(-1, (n, n)))
        return torch.cat([torch.sigmoid(read)[..., None], doubly_stochastic], -1), 2 * torch.sigmoid(write)

    def projection_flops(self) -> int:
        return 0 if self.weight is None else 2 * self.weight.numel()


def sinkhorn(logits: Tensor) -> Tensor:
    """Doubly stochastic matrices (..., n, n) from logits: exp, then rows and columns scaled to sum to one in turn."""
    matrix = torch.softmax(logits, -1) + torch.finfo(logits.dtype).eps ** 2  # no row or column vanishes
    matrix = (
        matrix.reshape(-1, *logits.shape[-2:]).permute(1, 2, 0).contiguous()
    )  # tokens last: 7 times as fast on a CPU
    for i in range(1, 2 * SINKHORN_STEPS):
        matrix = matrix / matrix.sum(0 if i % 2 else 1, keepdim=True)
    return matrix.permute(2, 0, 1).reshape(logits.shape)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(torch.get_default_dtype()).to(torch.get_default_device()))


@without_autocast
def _mixed(weights: Tensor, streams: Tensor) -> Tensor:
    """weights (..., n, m), streams (B, T, n, D) to (B, T, m, D); the stream keeps its precision."""
    return weights.mT @ streams
