"""The word problem of finite groups (Merrill et al., "The Illusion of State in State-Space Models", ICML 2024)."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Indices = NDArray[np.int64]

_MOST_ELEMENTS = 1000
_FIRST_STRETCH = 8


@register("state_tracking")
class StateTracking(Task):
    """Multiply elements of a group one by one, and answer with the product at every position.

    group="S3" (elements e, (23), (12), (123), (132), (13) are 0 to 5), length=6:

        ```
                   (12)   (123)  (13)   e      (23)   (12)
        inputs     2      3      5      0      1      2
        targets    2      5      0      0      1      3
        products   (12)   (13)   e      e      (23)   (123)
        ```

    Groups: `S`n (all orders of n things), `A`n (the even ones), `Z`n (sums modulo n; Z2 is parity), and products such
    as `A4xZ5`. In g_1 g_2 ... g_t the permutation g_1 acts first; permutations are numbered in lexicographic order and
    0 is the identity. S5 and A5 are not solvable: a model that reads them in one parallel pass of fixed depth must be
    able to compute all of NC1. S3 needs products of reflections, Z2 one reflection.

    The score adds `scaled`, (accuracy - chance) / (1 - chance) with a chance of one over the number of elements,
    `reach`, the number of products that are right before the first wrong one, and `accuracy_8`, `accuracy_16`,
    `accuracy_32`, ..., the accuracy on positions up to 8, from 9 to 16, from 17 to 32, ... Rows of a split have one
    length; no row is in two splits.
    """

    class Config(Options):
        """Options of `state_tracking`."""

        group: str = "S3"
        """The group: S3, S5, A5, Z60, Z2, A4xZ5, ..."""
        length: PositiveInt = 32
        """Elements of a row."""
        validation_length: PositiveInt | None = None
        """Elements of a row of validation, by default `length`."""
        test_length: PositiveInt | None = None
        """Elements of a row of test, by default `length`."""
        elements: Literal["all", "swaps", "3-cycles"] = "all"
        """Which elements are drawn: all, swaps of two things only, or the identity and cycles of three."""
        tokens_per_transition: Annotated[int, Field(ge=1, le=4)] = 1
        """Tokens of each element: itself, then fillers; the product is the target at the last."""

    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.group = find_group(c.group)
        self._drawn = self._choose()
        self._lengths = {
            "train": c.length,
            "validation": c.validation_length or c.length,
            "test": c.test_length or c.length,
        }
        for split, length in self._lengths.items():
            told = f"{split} rows of length={length} over {len(self._drawn)} elements"
            strings.check_instances(self.name, float(len(self._drawn)) ** min(length, 50), told)
        self.seq_len = max(self._lengths.values()) * c.tokens_per_transition
        self.filler = len(self.group.names)
        self.vocab_size = self.filler + (c.tokens_per_transition > 1)

    def _choose(self) -> Indices:
        """The elements that are drawn."""
        kind, images = self.config.elements, self.group.images
        if kind == "all":
            return np.arange(len(self.group.names))
        if images is None:
            raise UsageError(
                f"state_tracking: elements={kind!r} is for groups of permutations, S and A, not {self.config.group}."
            )
        moved = (images != np.arange(images.shape[1])).sum(1)
        drawn = np.flatnonzero(moved == 2) if kind == "swaps" else np.flatnonzero((moved == 0) | (moved == 3))
        if len(drawn) < 2:
            raise UsageError(f"state_tracking: {self.config.group} has too few elements that are {kind}.")
        return drawn

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        length, k = self._lengths[split], self.config.tokens_per_transition

        def draw(keys: random.Keys) -> Indices:
            return 1 + random.below(random.bits(keys, length), len(self._drawn))  # from 1, since 0 is padding there

        keys = random.row_keys(split, seed, start, n)
        elements = self._drawn[strings.draw_for_split(keys, split, draw) - 1]
        inputs = np.full((n, length, k), self.filler)
        targets = np.full((n, length, k), IGNORE)
        inputs[:, :, 0] = elements
        targets[:, :, -1] = self.group.products(elements)
        return Batch(torch.from_numpy(inputs.reshape(n, -1)), torch.from_numpy(targets.reshape(n, -1)))

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`scaled`, `reach` and the accuracies by position."""
        last = slice(self.config.tokens_per_transition - 1, None, self.config.tokens_per_transition)
        right = (predictions[:, last] == batch.targets[:, last]).double()
        length, chance = right.shape[1], 1 / len(self.group.names)
        figures = {"scaled": strings.scaled(batch, predictions, chance), "reach": right.cumprod(1).sum(1)}
        begin, end = 0, _FIRST_STRETCH
        while begin < length:
            figures[f"accuracy_{min(end, length)}"] = right[:, begin:end].mean(1)
            begin, end = end, 2 * end
        return figures

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        names = [*self.group.names, "."]  # and the filler
        said = predictions
        return strings.picture(
            [names[token] for token in batch.inputs[row].tolist()],
            ["" if target == IGNORE else names[target] for target in batch.targets[row].tolist()],
            None if said is None else [names[p] if 0 <= p < len(names) else "?" for p in said[row].tolist()],
            (f"{self.config.group} element", "product"),
        )

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """Permuted things as strands, or a sum as a line, with a mark at every wrong prediction."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        order, k = len(self.group.names), self.config.tokens_per_transition
        states = batch.targets[row, k - 1 :: k].numpy()
        time = np.arange(len(states) + 1)
        places = np.arange(order)[:, None] if self.group.images is None else self.group.images + 1
        figure = Figure(figsize=(min(2 + 0.25 * len(states), 16), 3), layout="constrained")
        axes = figure.add_subplot()
        for thing, line in enumerate(places[[0, *states]].T):
            axes.plot(time, line, "-o", color=f"C{thing}", markersize=3)
        if predictions is not None:
            wrong = time[1:][(predictions[row, k - 1 :: k].numpy() != states)]
            axes.plot(wrong, np.full(len(wrong), places.min() - 0.5), "x", color="tab:red")
            axes.set_title(f"{len(states) - len(wrong)} of {len(states)} products right", fontsize=10)
        axes.set_xlabel(f"elements of {self.config.group} so far")
        axes.set_ylabel("product" if self.group.images is None else "place of each thing")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        return figure


class Group(NamedTuple):
    """A finite group. Element 0 is the identity.

    Attributes:
        names: what each element is called.
        table: (m, m), the index of a b, where a acts first.
        images: (m, things), where each permutation puts each thing; None for other groups.
    """

    names: tuple[str, ...]
    table: Indices
    images: Indices | None

    def products(self, elements: Indices) -> Indices:
        """(n, T) products g_1 ... g_t of element sequences (n, T)."""
        flat, order = self.table.ravel(), len(self.names)
        products = np.empty_like(elements)
        state = np.zeros(len(elements), dtype=np.int64)
        for t in range(elements.shape[1]):
            state = flat.take(state * order + elements[:, t])
            products[:, t] = state
        return products


@functools.lru_cache(maxsize=8)
def find_group(name: str) -> Group:
    """The group that `name` stands for: `S5`, `A5`, `Z60`, or factors joined by `x`.

    Raises:
        UsageError: a name that is none, or a group that is too large.
    """
    factors = [re.fullmatch(r"([SAZ])([1-9]\d{0,3})", part) for part in name.split("x")]
    if not all(factors):
        raise UsageError(f"state_tracking: group={name!r} is not known: write S3, A5, Z60, or a product such as A4xZ5.")
    known = [(f[1], int(f[2])) for f in factors if f]
    orders = [n if kind == "Z" else math.factorial(n) // (1 + (kind == "A" and n > 1)) for kind, n in known]
    if not 2 <= math.prod(orders) <= _MOST_ELEMENTS:
        told = f"{math.prod(orders)} elements" if math.prod(orders) < 10**6 else "over a million elements"
        raise UsageError(f"state_tracking: group={name!r} has {told}; from 2 to {_MOST_ELEMENTS} are allowed.")
    groups = [_cyclic(n) if kind == "Z" else _permutations(n, even=kind == "A") for kind, n in known]
    return functools.reduce(_product, groups)


def _cyclic(n: int) -> Group:
    element = np.arange(n)
    return Group(tuple(map(str, range(n))), (element[:, None] + element) % n, None)


def _permutations(n: int, *, even: bool) -> Group:
    """S_n or A_n, in lexicographic order."""
    images = np.array(list(itertools.permutations(range(n))))
    if even:
        first, second = np.triu_indices(n, 1)
        images = images[(images[:, first] > images[:, second]).sum(1) % 2 == 0]
    place = n ** np.arange(n)[::-1]
    codes = images @ place  # rises with the lexicographic order
    both = images[:, images].swapaxes(0, 1)  # [a, b, i] is b(a(i))
    table = np.searchsorted(codes, both @ place)
    return Group(tuple(map(_cycles, images.tolist())), table, images)


def _cycles(images: list[int]) -> str:
    """A permutation in cycle notation, from 1 on."""
    text, seen = "", set()
    for start in range(len(images)):
        cycle, at = [], start
        while at not in seen:
            seen.add(at)
            cycle.append(str(at + 1))
            at = images[at]
        if len(cycle) > 1:
            text += f"({''.join(cycle)})"
    return text or "e"


def _product(a: Group, b: Group) -> Group:
    """The direct product: element i of a and j of b is number i |b| + j."""
    size = len(b.names)
    names = tuple(f"{x},{y}" for x in a.names for y in b.names)
    table = a.table[:, None, :, None] * size + b.table[None, :, None, :]
    return Group(names, table.reshape(len(names), len(names)), None)
