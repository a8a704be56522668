"""Path-star graphs (Bachmann and Nagarajan, "The pitfalls of next-token prediction", ICML 2024, arXiv 2403.06963)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import Batch, Split, Task, check_request, names_of, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETWEEN, QUESTION, EQUALS, LABEL = 1, 2, 3, 4
_LENGTH, _LABELS, _GOAL, _ORDER = range(4)  # purposes of a row's random numbers


@register("star_graph")
class StarGraph(Task):
    """Write the path from the centre of a star to the end of one of its arms.

    n_paths=2, length=3, labels=9, as a person sees it and as tokens (1 is `|`, 2 is `/`, 3 is `=`, labels are 4 to 12,
    `.` is `IGNORE`):

        ```
                  0  6  |  4  5  |  6  2  |  0  4  |  /  0  5  =  0  4
        inputs    4 10  1  8  9  1 10  6  1  4  8  1  2  4  9  3  4  8
        targets   .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  4  8  9
        ```

    A row is the edges of a star in random order, each from the centre outwards, then centre and goal, and the path from
    one to the other. `n_paths` arms start at the centre; with it, each has `length` nodes. Only the second node of the
    path is hard: it is one of `n_paths` neighbours, and the right one is known only by going back from the goal. Every
    later node is the other end of an edge of the node before it. So a model that is trained to predict each node from
    the true nodes before it can learn the later ones and never the second (the Clever Hans effect of the paper);
    `reverse` has the path written from the goal, which is easy. `masked_diffusion` and `deep_supervision` predict the
    path without the nodes before.

    The score has `branch`, the share of rows with a right second node: chance is one in `n_paths`, also for `exact`.
    All stars of one size are equal but for their labels, so that rows of different splits differ in the labels of
    edges, in any order. Slices: `length`.
    """

    class Config(Options):
        """Options of `star_graph`."""

        n_paths: Annotated[int, Field(ge=2, le=1000)] = 2
        """Arms of the star, d of the paper's G(d, l)."""
        length: Annotated[int, Field(ge=2, le=1000)] = 5
        """Nodes of a path, the centre included: l of the paper."""
        min_length: Annotated[int, Field(ge=2)] | None = None
        """Fewest nodes of a path, for rows of different lengths, which are uniform."""
        labels: Annotated[int, Field(ge=3)] = 50
        """Number of labels from which those of the nodes are drawn."""
        reverse: bool = False
        """Write the path from the goal to the centre."""

    layout = "next_token"
    continues = True
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self._shortest = c.length if c.min_length is None else c.min_length
        if self._shortest > c.length:
            raise UsageError(f"star_graph: min_length={c.min_length} is more than length={c.length}.")
        self.n_edges = c.n_paths * (c.length - 1)
        if c.labels <= self.n_edges:
            told = f"n_paths={c.n_paths} and length={c.length} make {self.n_edges + 1} nodes"
            raise UsageError(f"star_graph: {told}, which need as many labels; labels={c.labels} are too few.")
        fewest = c.n_paths * (self._shortest - 1) + 1
        stars = math.perm(min(c.labels, 60), min(fewest, 50)) / math.factorial(min(c.n_paths, 50) - 1)
        strings.check_instances(self.name, stars, f"labels={c.labels} with stars of {fewest} nodes")
        self.vocab_size = LABEL + c.labels
        self.seq_len = 3 * self.n_edges + 3 + c.length

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        tokens = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._texts, _names)
        answer = np.cumsum(tokens == EQUALS, axis=1) > 0
        asked = answer & (tokens >= LABEL)
        inputs, targets = strings.continued(tokens, asked)
        lengths = torch.from_numpy(asked.sum(1))
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), {"length": lengths})

    def _texts(self, keys: random.Keys) -> strings.Tokens:
        """(n, L + 1) edges, question and answer."""
        c, n = self.config, len(keys)
        lengths = self._shortest + random.below(random.fold(keys, _LENGTH), c.length - self._shortest + 1)
        labels = LABEL + random.distinct(random.fold(keys, _LABELS), self.n_edges + 1, c.labels)
        arms = labels[:, 1:].reshape(n, c.n_paths, c.length - 1)
        center = labels[:, :1]
        paths = np.concatenate([np.repeat(center[:, None], c.n_paths, axis=1), arms], axis=2)
        there = np.arange(c.length) < lengths[:, None]
        ends = np.stack([paths[:, :, :-1], paths[:, :, 1:], np.full_like(arms, BETWEEN)], axis=3)
        drawn = np.where(there[:, None, 1:, None], ends, 0).reshape(n, self.n_edges, 3)
        order = random.bits(random.fold(keys, _ORDER), self.n_edges).argsort(1)
        edges = np.take_along_axis(drawn, order[..., None], axis=1).reshape(n, -1)
        path = np.where(there, paths[np.arange(n), random.below(random.fold(keys, _GOAL), c.n_paths)], 0)
        goal = np.take_along_axis(path, lengths[:, None] - 1, axis=1)
        written = path[:, ::-1] if c.reverse else path
        question, equals = (np.full((n, 1), mark) for mark in (QUESTION, EQUALS))
        return strings.packed(np.concatenate([edges, question, center, goal, equals, written], axis=1))

    def problems(self, batch: Batch) -> Tensor:
        """Stars with their labels and the goal, in any order of their edges."""
        return names_of(_names(batch.inputs.cpu().numpy()))

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`branch`: whether the neighbour of the centre is right."""
        scored = batch.scored
        place = scored.cumsum(1)
        wanted = scored.sum(1, keepdim=True) - 1 if self.config.reverse else 2
        at = scored & (place == wanted)
        return {"branch": ((predictions == batch.targets) & at).any(1).double()}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        arms, (center, goal) = self._star(batch, row)
        scored = batch.scored[row]
        answer = batch.targets[row][scored].tolist()
        edges = [token for token in batch.inputs[row].tolist() if token >= LABEL][: 2 * sum(map(len, arms))]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        lines = {
            "edges": "  ".join(f"{self.spell(a)}>{self.spell(b)}" for a, b in pairs),
            "question": f"from {self.spell(center)} to {self.spell(goal)}",
            "answer": " ".join(map(self.spell, answer)),
        }
        if predictions is not None:
            said = predictions[row][scored].tolist()
            words = (self.spell(a) + "!" * (a != b) for a, b in zip(said, answer, strict=True))
            lines["predicted"] = " ".join(words)
        return "\n".join(f"{name:<11}{text}" for name, text in lines.items())

    def _star(self, batch: Batch, row: int) -> tuple[list[list[int]], tuple[int, int]]:
        """The arms of a star as tokens without its centre, and centre and goal."""
        tokens = batch.inputs[row].tolist()
        question = tokens.index(QUESTION)
        center, goal = tokens[question + 1 : question + 3]
        edges = list(zip(tokens[:question:3], tokens[1:question:3], strict=True))
        following = {a: b for a, b in edges if a != center}
        arms = [[b] for a, b in edges if a == center]
        for arm in arms:
            while arm[-1] in following:
                arm.append(following[arm[-1]])
        return arms, (center, goal)

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """The star; the nodes of the answer are blue, those of a wrong prediction have a red ring."""
        from matplotlib.figure import Figure

        arms, (center, goal) = self._star(batch, row)
        scored = batch.scored[row]
        path = set(batch.targets[row][scored].tolist())
        said = path if predictions is None else set(predictions[row][scored].tolist())
        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_aspect("equal")
        axes.set_axis_off()
        reach = self.config.length - 0.5
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        places = {center: (0.0, 0.0)}
        for i, arm in enumerate(arms):
            angle = 2 * math.pi * i / len(arms)
            for j, node in enumerate(arm, 1):
                places[node] = (j * math.cos(angle), j * math.sin(angle))
            line = [places[node] for node in (center, *arm)]
            axes.plot(*zip(*line, strict=True), color="0.6", zorder=1)
        for node, (x, y) in places.items():
            fill = "tab:orange" if node in (center, goal) else "#7cc0ee" if node in path else "white"
            wrong = (node in said) != (node in path)
            axes.scatter(x, y, s=330, color=fill, edgecolors="tab:red" if wrong else "black", zorder=2)
            axes.text(x, y, self.spell(node), ha="center", va="center", zorder=3)
        return figure

    def spell(self, token: int) -> str:
        if token < LABEL:
            return ".|/="[token] if token >= 0 else "?"
        return str(token - LABEL) if token < self.vocab_size else "?"


def _names(tokens: strings.Tokens) -> random.Keys:
    """(n,) a hash of the edges of each row (n, L), in any order, with centre and goal."""
    question = (tokens == QUESTION).argmax(1)
    pieces = tokens[:, : tokens.shape[1] // 3 * 3].reshape(len(tokens), -1, 3).astype(np.uint64)
    is_edge = np.arange(pieces.shape[1]) * 3 < question[:, None]
    edges = random.mix(pieces[..., 0] << np.uint64(32) | pieces[..., 1])
    total = np.where(is_edge, edges, np.uint64(0)).sum(1)
    goal = np.take_along_axis(tokens, question[:, None] + 2, axis=1)[:, 0]
    return random.fold(random.mix(total), goal)
