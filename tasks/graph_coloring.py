"""Graph colouring with a planted solution, some of whose colours are given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, SPLITS, Batch, Split, Symmetry, Task, check_request, names_of, register
from zoo.tasks.sketch import Cell, Kind, Sketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLANK, APART, EDGE, COLOUR = 1, 2, 3, 4
_MAX_REDRAWS = 10_000
_REFINEMENTS = 4  # of the names of nodes, in a fingerprint
_COUNTED = 64  # colourings, at most, for a slice
_COLOURS, _EDGES, _NUMBER, _GIVEN, _GIVENS = range(5)  # purposes of a row's random numbers
_PALETTE = ["#4c9be8", "#f2a541", "#63b76c", "#d9675f", "#9a7bd1", "#c9b458", "#58b7b4", "#d685b5"]


@register("graph_coloring")
class GraphColoring(Task):
    """Colour the nodes of a graph so that no edge joins two of one colour; some colours are given.

    nodes=4, colors=3, min_edges=max_edges=4, givens=2, as a person sees it and as tokens, one line for each node (0
    padding, 1 blank, 2 no edge, 3 an edge, colour a as 4; `.` is `IGNORE`):

        ```
             0  1  2  3    answer
         0   ?  -  -       b            inputs   1 3 3 2       targets   5 . . .
         1   -  ?     -    c                     3 1 2 3                 . 6 . .
         2   -     a  -    a                     3 2 4 3                 . . 4 .
         3      -  -  b    b                     2 3 3 5                 . . . 5
        ```

    The input is the matrix of edges, with the colours on its diagonal. All nodes get colours at random, then edges
    between nodes of different colours; each colour has as many nodes as another, or one more. These planted colours are
    the targets; most graphs have other solutions. Right is every colouring in which the ends of each edge differ, and
    which keeps the given colours. A node counts for `accuracy` if no neighbour has its colour.

    Splits are disjoint by the graph up to the order of its nodes, whatever the colours. (Graphs are compared by refined
    degrees, which are equal for equal graphs, and for a few others.) Slices: `edges`, their number by node, rounded
    down to halves, and `colorings`, the number of right answers, up to 64, rounded up to the next of 1, 2, 3, 4, 6, ...
    """

    class Config(Options):
        """Options of `graph_coloring`."""

        nodes: Annotated[int, Field(ge=4, le=32)] = 10
        """Nodes of the graph."""
        colors: Annotated[int, Field(ge=2, le=8)] = 3
        """Colours that may be used, also by the planted solution."""
        min_edges: NonNegativeInt | None = None
        """Fewest edges, by default one and a half by node. A graph has fewer where its colours allow no more."""
        max_edges: NonNegativeInt | None = None
        """Most edges, by default two and a half by node."""
        givens: NonNegativeInt = 3
        """Nodes whose colour is given. Without any, the colours may be renamed."""

    layout = "fill_in"
    blank = BLANK
    many_answers = "the colours that were planted"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.nodes, self.seq_len, self.vocab_size = c.nodes, c.nodes**2, COLOUR + c.colors
        self.n_symmetries = math.factorial(c.nodes) * math.factorial(c.colors)
        pairs = c.nodes * (c.nodes - 1) // 2
        low = c.nodes * 3 // 2 if c.min_edges is None else c.min_edges
        high = min(max(c.nodes * 5 // 2, low), pairs) if c.max_edges is None else c.max_edges
        self._edges = low, high
        if low > high:
            raise UsageError(f"graph_coloring: min_edges={low} is more than max_edges={high}.")
        if high > pairs:
            raise UsageError(f"graph_coloring: {c.nodes} nodes have at most {pairs} edges, not max_edges={high}.")
        if c.givens >= c.nodes:
            raise UsageError(f"graph_coloring: givens={c.givens} leaves none of {c.nodes} nodes to be coloured.")

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        from zoo.tasks.kernels import coloring

        check_request(n, split, start)
        keys, N = random.row_keys(split, seed, start, n), self.nodes
        edges, left = np.zeros((n, N, N), dtype=np.bool_), np.arange(n)
        colours, given = np.zeros((n, N), dtype=np.int64), np.zeros((n, N), dtype=np.bool_)
        for attempt in range(_MAX_REDRAWS):
            drawn = self._draw(random.fold(keys[left], attempt))
            found = random.split_of(fingerprint(drawn[0])) == SPLITS.index(split)
            for whole, new in zip((edges, colours, given), drawn, strict=True):
                whole[left[found]] = new[found]
            left = left[~found]
            if not len(left):
                break
        else:
            raise UsageError(f"graph_coloring: found no graph for the split {split!r}: allow more edges.")
        inputs = np.where(edges, EDGE, APART)
        inputs[:, range(N), range(N)] = np.where(given, COLOUR + colours, BLANK)
        targets = np.full((n, N, N), IGNORE)
        targets[:, range(N), range(N)] = COLOUR + colours
        counts = np.empty(n, dtype=np.int64)
        coloring.count(edges, np.where(given, colours, -1), self.config.colors, _COUNTED, counts)
        slices = {"edges": edges.sum((1, 2)) // N / 2, "colorings": strings.length_bucket(counts)}
        return Batch(
            torch.from_numpy(inputs.reshape(n, -1)),
            torch.from_numpy(targets.reshape(n, -1)),
            {name: torch.from_numpy(values) for name, values in slices.items()},
        )

    def _draw(self, keys: random.Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.bool_]]:
        """Edges (n, N, N), colours (n, N) from 0, and which of these are given (n, N)."""
        c, N, (low, high) = self.config, self.nodes, self._edges
        words = random.bits(random.fold(keys, _COLOURS), N + 1)
        colours = (words[:, 1:].argsort(1) + random.below(words[:, :1], c.colors)) % c.colors
        a, b = np.triu_indices(N, 1)
        order = random.bits(random.fold(keys, _EDGES), len(a)) >> np.uint64(1)
        order[colours[:, a] == colours[:, b]] = 2**64 - 1
        number = low + random.below(random.fold(keys, _NUMBER), high - low + 1)
        kept = (order.argsort(1).argsort(1) < number[:, None]) & (order < 2**63)
        edges = np.zeros((len(keys), N, N), dtype=np.bool_)
        edges[:, a, b] = edges[:, b, a] = kept
        given = random.bits(random.fold(keys, _GIVEN), N).argsort(1).argsort(1) < c.givens
        return edges, colours, given

    def symmetry(self, index: int) -> Symmetry:
        """Another order of the nodes and other names of the colours, drawn by their number."""
        tokens, order = np.arange(self.vocab_size), np.arange(self.nodes)
        if index:
            keys = random.mix([index])
            order = random.permutation(random.fold(keys, 0), self.nodes)
            tokens[COLOUR:] = COLOUR + random.permutation(random.fold(keys, 1), self.config.colors)
        cells = np.arange(self.seq_len).reshape(self.nodes, self.nodes)[np.ix_(order, order)]
        return Symmetry(torch.from_numpy(cells.flatten()), torch.from_numpy(tokens))

    def problems(self, batch: Batch) -> Tensor:
        """Graphs up to the order of their nodes, whatever the given colours."""
        return names_of(fingerprint(self._matrix(batch.inputs).cpu().numpy() == EDGE))

    def _matrix(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (self.nodes, self.nodes))

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        """Whether every node has a colour that no neighbour has, and that was not another one before."""
        return self._good(batch, answers).all(1)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        """Nodes with a colour that no neighbour has, and that was not another one before."""
        return torch.diag_embed(self._good(batch, answers)).flatten(1)

    def _good(self, batch: Batch, answers: Tensor) -> Tensor:
        """`right_cells` by node, (n, N)."""
        edges, before = (self._matrix(batch.inputs) == EDGE), self._matrix(batch.inputs).diagonal(0, 1, 2)
        said = self._matrix(answers).diagonal(0, 1, 2)
        clash = (edges & (said[:, :, None] == said[:, None, :])).any(2)
        kept = (before == BLANK) | (said == before)
        return (said >= COLOUR) & (said < self.vocab_size) & kept & ~clash

    def kinds(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> list[Kind]:
        """Nodes without a colour clash with none."""
        shown = torch.where(hidden & (batch.targets != IGNORE), BLANK, tokens)
        return super().kinds(batch, row, shown, hidden)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        N = self.nodes
        inputs, answer = self._matrix(batch.inputs)[row].tolist(), self._matrix(batch.targets)[row].diagonal().tolist()
        lines = ["    " + " ".join(f"{j:>2}" for j in range(N)) + "    answer"]
        said, good = [""] * N, [True] * N
        if predictions is not None:
            good = self._good(batch, predictions)[row].tolist()
            said = [self.spell(token) for token in self._matrix(predictions)[row].diagonal().tolist()]
            lines[0] += f"    predicted: {'right' if all(good) else 'wrong'} (! wrong)"
        for i in range(N):
            cells = [self.spell(inputs[i][i]) if i == j else "-" if inputs[i][j] == EDGE else " " for j in range(N)]
            marked = said[i] + ("" if good[i] else "!")
            lines.append(
                f"{i:>2}  " + " ".join(f"{c:>2}" for c in cells) + f"    {self.spell(answer[i])}         {marked}"
            )
        return "\n".join(line.rstrip() for line in lines)

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """The graph, its nodes in a circle; edges within one colour red, given colours with a thick ring."""
        from matplotlib.figure import Figure

        N = self.nodes
        matrix = self._matrix(batch.inputs)[row].tolist()
        colours = self._matrix(batch.targets if predictions is None else predictions)[row].diagonal().tolist()
        angles = np.pi / 2 - 2 * np.pi * np.arange(N) / N
        x, y = np.cos(angles), np.sin(angles)
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_aspect("equal")
        axes.set_axis_off()
        for i, j in zip(*map(np.ndarray.tolist, np.tril_indices(N)), strict=True):
            if matrix[i][j] != EDGE:
                continue
            clash = colours[i] == colours[j]
            axes.plot(x[[i, j]], y[[i, j]], color="tab:red" if clash else "0.6", linewidth=2 if clash else 1, zorder=1)
        for i, colour in enumerate(colours):
            fill = _PALETTE[colour - COLOUR] if COLOUR <= colour < self.vocab_size else "white"
            ring = 2.5 if matrix[i][i] != BLANK else 0.8
            axes.scatter(x[i], y[i], s=330, color=fill, edgecolors="black", linewidths=ring, zorder=2)
            axes.text(x[i], y[i], str(i), ha="center", va="center", zorder=3)
        return figure

    def sketch(self, batch: Batch, row: int, tokens: Tensor, hidden: Tensor) -> Sketch:
        """The matrix, with its colours on the diagonal."""
        kinds = self.kinds(batch, row, tokens, hidden)
        cells = []
        for i, (kind, token) in enumerate(zip(kinds, tokens[row].tolist(), strict=True)):
            if i % (self.nodes + 1):
                edge = int(batch.inputs[row, i]) == EDGE
                cells.append(Cell("given", "", "- " if edge else "  ", "#8a8f98" if edge else "#ffffff"))
                continue
            word = "?" if kind == "hidden" else self.spell(token)
            cells.append(Cell(kind, "" if kind == "hidden" else word, f"{word} "))
        return Sketch(self.nodes, tuple(cells))

    def spell(self, token: int) -> str:
        return chr(ord("a") + token - COLOUR) if COLOUR <= token < self.vocab_size else "?"


def fingerprint(edges: NDArray[np.bool_]) -> random.Keys:
    """(n,) a hash of each graph (n, N, N) that no order of its nodes changes.

    A node is named by its degree, then again and again by its name and those of its neighbours (Weisfeiler and Leman).
    """
    names = random.mix(edges.sum(2))
    for _ in range(_REFINEMENTS):
        around = np.where(edges, random.mix(names)[:, None, :], np.uint64(0)).sum(2)
        names = random.mix(names + random.mix(around) * np.uint64(3))
    return random.mix(random.mix(names).sum(1))
