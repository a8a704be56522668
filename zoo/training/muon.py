"""Muon where several processes train a model: each makes the updates of some matrices orthogonal, for all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.training.group import Group
from zoo.training.shards import own_rows

COEFFICIENTS = 3.4445, -4.775, 2.0315  # of Newton and Schulz's iteration, as Keller Jordan chose them
EPS = 1e-7
WIRE = torch.bfloat16  # in which the iteration computes, whatever the update came in: nothing is lost on the way


def orthogonal(update: Tensor, steps: int) -> Tensor:
    """The nearest orthogonal matrix, nearly, of a matrix in bfloat16: singular values of 0.7 to 1.2.

    `torch.optim.Muon` computes the same bits.
    """
    a, b, c = COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@functools.lru_cache
def owners(shapes: tuple[tuple[int, ...], ...], size: int) -> tuple[int, ...]:
    """The process that computes for each matrix: the largest first, each for the process with least work so far."""
    work = [0] * size
    found = [0] * len(shapes)
    cost = [max(shape) * min(shape) ** 2 for shape in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        found[i] = min(range(size), key=lambda rank: (work[rank], rank))
        work[found[i]] += cost[i]
    return tuple(found)


class SharedMuon(torch.optim.Optimizer):
    """Muon (`torch.optim.Muon`) of several processes, which hold the matrices whole or their rows in pieces.

    A process computes the momentum of what it has. Where matrices are in pieces, it sends its rows of an update to the
    matrix's owner; the owner makes the update orthogonal and sends it, or the rows of each process, back. Everything
    travels in bfloat16, in which the iteration computes: the bits are those of one process with the same gradients.

    Args:
        params: matrices or groups of them; of this process's rows, where `shapes` says so.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: of the running mean of the gradients.
        nesterov: whether the gradient is moved on by it once more.
        ns_steps: of the iteration.
        adjust_lr_fn: factor on the learning rate, as in `torch.optim.Muon`.
        shapes: of the whole matrices, by parameter; by default those of `params`.
        in_pieces: whether each process has some rows of every matrix only.
        group: the processes.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        shapes: Mapping[nn.Parameter, torch.Size] | None = None,
        in_pieces: bool = False,
        group: Group = Group(),
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._momentum, self._nesterov, self._steps, self._adjust = momentum, nesterov, ns_steps, adjust_lr_fn
        self._shapes, self._group = shapes or {p: p.shape for each in self.param_groups for p in each["params"]}, group
        self._share = self._in_pieces if in_pieces else self._whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient, in all processes alike."""
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return
        updates = [self._update(p) for p, _ in moved]
        shapes = [self._shapes[p] for p, _ in moved]
        owner = owners(tuple(shapes), self._group.size)
        for (p, group), update, shape in zip(moved, self._share(updates, shapes, owner), shapes, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * self._factor(shape))

    def _update(self, p: nn.Parameter) -> Tensor:
        """This process's part of an update that is not orthogonal yet."""
        assert p.grad is not None
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = self.state[p]["momentum_buffer"]
        mean.lerp_(p.grad, 1 - self._momentum)
        return (p.grad.lerp(mean, self._momentum) if self._nesterov else mean).to(WIRE)

    def _factor(self, shape: tuple[int, ...]) -> float:
        rows, columns = shape
        if self._adjust == "original":
            return math.sqrt(max(1, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

    def _whole(self, updates: list[Tensor], shapes: list[torch.Size], owner: tuple[int, ...]) -> list[Tensor]:
        """Updates that every process has: each is made orthogonal by its owner and then sent to all."""
        rank, size = self._group.rank, self._group.size
        mine = [orthogonal(u, self._steps).flatten() for u, at in zip(updates, owner, strict=True) if at == rank]
        lengths = [[s.numel() for s, at in zip(shapes, owner, strict=True) if at == other] for other in range(size)]
        own = torch.cat(mine) if mine else updates[0].new_empty(0)
        found = self._group.exchange([own] * size, [sum(each) for each in lengths])
        each = [iter(part.split(n)) for part, n in zip(found, lengths, strict=True)]
        return [next(each[at]).view(shape) for shape, at in zip(shapes, owner, strict=True)]

    def _in_pieces(self, updates: list[Tensor], shapes: list[torch.Size], owner: tuple[int, ...]) -> list[Tensor]:
        """Updates of which every process has some rows: gathered by their owners, and given back by rows."""
        rank, size, places = self._group.rank, self._group.size, range(self._group.size)
        mine = [shape for shape, at in zip(shapes, owner, strict=True) if at == rank]
        rows = [[own_rows(shape[0], other, size) for shape in mine] for other in places]
        lengths = [[(r.stop - r.start) * s[1] for r, s in zip(cut, mine, strict=True)] for cut in rows]
        sent = [_flat([u for u, at in zip(updates, owner, strict=True) if at == to], updates[0]) for to in places]
        pieces = self._group.exchange(sent, [sum(each) for each in lengths])
        split = [list(part.split(each)) for part, each in zip(pieces, lengths, strict=True)]
        whole = [torch.cat([split[other][i] for other in places]).view(shape) for i, shape in enumerate(mine)]
        done = [orthogonal(matrix, self._steps) for matrix in whole]
        back = [_flat([m[r] for m, r in zip(done, rows[to], strict=True)], updates[0]) for to in places]
        own = [[u.numel() for u, at in zip(updates, owner, strict=True) if at == other] for other in places]
        found = self._group.exchange(back, [sum(each) for each in own])
        each = [iter(part.split(n)) for part, n in zip(found, own, strict=True)]
        return [next(each[at]).view(u.shape) for u, at in zip(updates, owner, strict=True)]


def _flat(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Tensors one after another."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else like.new_empty(0)


__all__ = ["SharedMuon", "orthogonal", "owners"]
