"""A block of a pattern that is used in several places: one set of weights, and a state for each use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.loops import Inject
from zoo.pattern import Pattern, Shared
from zoo.protocol import Context, State

EMBEDDING = "embedding"
"""The name in `Context.shared` of what the first layer of the network reads, (B, T, D)."""


class Block(nn.Module):
    """What all uses of a shared block have in common.

    Args:
        node: the block, with its options.
        body: its steps; with inject="wide", the first one reads 2 D channels.
        d_model: D.
        norm_eps: epsilon of the norms.
    """

    def __init__(self, node: Shared, body: Any, d_model: int, norm_eps: float):
        super().__init__()
        self.wide = node.options.inject == "wide"
        self.inject = Inject("none" if self.wide else node.options.inject, d_model, 1, norm_eps)
        self.body = body

    def forward(
        self, h: Tensor, e: Tensor, state: State | None, context: Context, *, recompute: bool = False
    ) -> tuple[Tensor, State]:
        u = torch.cat([h, e], -1) if self.wide else self.inject(h, e)
        return self.body(u, state, context, recompute=recompute)


@dataclass
class Blocks:
    """The shared blocks of a network by name, as far as they have been made.

    Attributes:
        uses: number of uses of each in the whole network.
        made: the blocks, in the order of their first uses.
        used: number of uses of each that have been made.
    """

    uses: Counter[str]
    made: dict[str, Block] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, pattern: Pattern) -> Blocks:
        """Those of a pattern, none of them made."""
        return cls(Counter(step.label for step in pattern.unrolled() if isinstance(step, Shared)))


class SharedStep(nn.Module):
    """One use of a shared block: y = f(u), with u from the stream h and the embedding e, see `SharedOptions`.

    Weight sharing between depths as in ALBERT (Lan et al. 2020, arXiv 1909.11942), or the global blocks of Zamba
    (Glorioso et al. 2024, arXiv 2405.16712, section 2) and Zamba2 (arXiv 2411.15242). The weights of f belong to the
    outermost network; a use owns its output projection only. With enters="next" the result is W_i y, for the word that
    follows, and f is a network of one residual stream.

    Args:
        node: the block, with its options.
        block: what the uses share.
        use: number of this use.
        uses: number of all uses.
        d_model: D.
        widen: (B, T, D) to the residual streams.
        narrow: the residual streams as one (B, T, D).
    """

    def __init__(
        self,
        node: Shared,
        block: Block,
        use: int,
        uses: int,
        d_model: int,
        *,
        widen: Callable[[Tensor], Tensor],
        narrow: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.options, self.use, self.uses, self.d_model = node.options, use, uses, d_model
        self.widen, self.narrow = widen, narrow
        self._block = (block,)  # in a tuple, since it is no part of this use alone
        self.out_proj = None
        if node.options.out_proj:
            self.out_proj = nn.Linear(d_model, d_model, bias=False)
            nn.init.normal_(self.out_proj.weight, std=d_model**-0.5)

    @property
    def block(self) -> Block:
        """What all uses share."""
        return self._block[0]

    @property
    def body(self) -> Any:
        """The steps of the block."""
        return self.block.body

    @property
    def enters_next(self) -> bool:
        """Whether the result is for the next word alone, and not the stream."""
        return self.options.enters == "next"

    def forward(
        self, x: Tensor, state: State | None, context: Context, *, recompute: bool = False
    ) -> tuple[Tensor, State]:
        own = replace(context, losses=[], use=self.use)
        h, e = self.narrow(x) if self.enters_next else x, x
        if self.options.inject != "none":
            e = context.shared[EMBEDDING]
            e = e if self.enters_next else self.widen(e)
        y, state = self.block(h, e, state, own, recompute=recompute)
        context.losses.extend(loss / self.uses for loss in own.losses)
        return (y if self.out_proj is None else self.out_proj(y).to(y.dtype)), state

    def init_state(self, batch_size: int, **options: Any) -> State:
        return self.body.init_state(batch_size, **options)

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype) -> int:
        """Bytes of the state of this use after `context_length` steps."""
        return self.body.state_bytes(batch_size, context_length, dtype)

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs of one token in this use."""
        one = torch.empty(1, 1, self.d_model, device="meta")
        streams = (one if self.enters_next else self.widen(one)).numel() // self.d_model
        injected = streams * self.block.inject.flops_per_token()
        own = 0 if self.out_proj is None else 2 * self.d_model**2
        return self.body.flops_per_token(context_length) + injected + own


def modules_used(network: nn.Module) -> Iterator[nn.Module]:
    """The modules of a network, and those of the shared blocks that it uses, which may belong to one around it."""
    for module in network.modules():
        yield module
        if isinstance(module, SharedStep):
            yield from modules_used(module.block)


__all__ = ["EMBEDDING", "Block", "Blocks", "SharedStep", "modules_used"]
