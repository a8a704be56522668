"""Depo, the depth of reasoning: the k-th successor in a cycle (Allen-Zhu 2025, arXiv 2512.17351; after the code of
PhysicsLM4)."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.tasks import random, strings
from zoo.tasks.graph_words import FEWEST_NODES, WordOptions, Words, sizes
from zoo.tasks.protocol import Batch, Split, Task, check_request, names_of, register

_EQUALS, _HOPS = 1, 2


@register("depo")
class Depo(Task):
    """Find the k-th successor of a node in a directed cycle whose edges come in random order.

    With max_nodes=4, max_hops=2, n_queries=2, letters=8, as a person sees it and as tokens (1 is `=`, 2 is `+1`, 3 is
    `+2`, words are 4 to 11, `.` is `IGNORE`):

        ```
                  7>0   4>7   0>5   5>4  +2 7  =  5 +2 4  =        0
        inputs   11  4  8 11  4  9  9  8  3 11  1  9  3  8  1
        targets   .  .  .  .  .  .  .  .  .  .  9  .  .  .  4      two steps from 4 are 7 and 0
        ```

    A row is the edges of one cycle through all nodes, then `n_queries` different nodes, each with its number of hops k
    and its answer. Nothing but the answers is scored, and no step in between is written, so the model makes the hops
    within itself. In training a cycle has 3 to `max_nodes` nodes, i of them with a probability proportional to
    1 / (i + sqrt(max_nodes)), and every question its own k, uniform from 1 to `max_hops`. Held-out rows have
    `max_nodes` nodes, and all questions of a row have the same k, a power of two or `max_hops`; the authors draw a k
    for each question.

    Nodes are named by words of random letters. The authors' Depo1 has max_nodes=225 (300, 375), max_hops=8,
    n_queries=10, letters=50, max_word=2; their Depo2 has max_nodes=75 (100, 125), max_hops=16, letters=3, min_word=5,
    max_word=7.

    Chance is one in the number of nodes. A cycle is in one split, in any order of its edges and with any questions.
    Slices: `hops` (in training rows the most of a row), and `nodes`, rounded up to the next of 3, 4, 6, 8, 12, 16, ...
    """

    class Config(WordOptions):
        """Options of `depo`."""

        max_nodes: Annotated[int, Field(ge=FEWEST_NODES)] = 12
        """Nodes of the longest cycle, and of held-out cycles."""
        max_hops: PositiveInt = 4
        """Most hops of a question."""
        n_queries: PositiveInt = 8
        """Questions of a row; one for each node where the cycle is shorter."""

    layout = "next_token"
    continues = True
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self._most_queries = min(c.n_queries, c.max_nodes)
        self.words = Words(self.name, c, _HOPS + c.max_hops, c.max_nodes)
        self.vocab_size = self.words.vocab_size
        self.seq_len = 2 * c.max_nodes * c.max_word + self._most_queries * (2 + 2 * c.max_word) - 1
        powers = [2**i for i in range(c.max_hops.bit_length())]
        self.tested_hops = np.array(sorted({*powers, c.max_hops}))
        """Numbers of hops of held-out rows."""
        cycles = math.perm(self.words.number, min(c.max_nodes, 20)) / min(c.max_nodes, 20)
        told = f"max_nodes={c.max_nodes}, letters={c.letters} with max_word={c.max_word}"
        strings.check_instances(self.name, cycles, told)

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        tokens = strings.draw_for_split(
            random.row_keys(split, seed, start, n), split, lambda keys: self._texts(keys, split), self._cycles
        )
        marked = (tokens >= _HOPS) & (tokens < self.words.first)
        asked = strings.since(tokens == _EQUALS, marked) & (tokens > 0)
        inputs, targets = strings.continued(tokens, asked)
        nodes = (self._edges(tokens) & self.words.is_last(tokens)).sum(1) // 2
        slices = {"hops": np.where(marked, tokens - _HOPS + 1, 0).max(1), "nodes": strings.length_bucket(nodes)}
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {k: torch.from_numpy(v) for k, v in slices.items()}
        )

    def _texts(self, keys: random.Keys, split: Split) -> strings.Tokens:
        """(n, L + 1) edges, questions and answers."""
        c, n = self.config, len(keys)
        nodes = sizes(random.fold(keys, 0), c.max_nodes, split)[:, None]
        names = self.words.draw(random.fold(keys, 1), c.max_nodes)
        place = np.arange(c.max_nodes)
        names = np.where(place < nodes, names, -1)
        following = np.take_along_axis(names, (place + 1) % nodes, axis=1)
        edges = np.stack([names, np.where(place < nodes, following, -1)], axis=2)
        order = np.argsort(random.bits(random.fold(keys, 2), c.max_nodes), axis=1)  # absent edges are dropped below
        edges = np.take_along_axis(edges, order[:, :, None], axis=1)

        chance = np.where(place < nodes, random.uniform(random.bits(random.fold(keys, 3), c.max_nodes)), 2.0)
        asked = np.argsort(chance, axis=1)[:, : self._most_queries]
        draws = random.bits(random.fold(keys, 4), self._most_queries)
        if split == "train":
            hops = 1 + random.below(draws, c.max_hops)
        else:
            hops = np.broadcast_to(self.tested_hops[random.below(draws[:, :1], len(self.tested_hops))], asked.shape)
        present = asked < nodes
        answers = np.take_along_axis(names, (asked + hops) % nodes, axis=1)
        starts = np.take_along_axis(names, asked, axis=1)
        mark = np.where(present, _HOPS - 1 + hops, 0)[:, :, None]
        question = self.words.spelt(np.where(present, starts, -1))
        answer = self.words.spelt(np.where(present, answers, -1))
        queries = np.concatenate([mark, question, np.where(mark > 0, _EQUALS, 0), answer], axis=2)
        return strings.packed(np.concatenate([self.words.spelt(edges).reshape(n, -1), queries.reshape(n, -1)], axis=1))

    def _edges(self, tokens: strings.Tokens) -> strings.Tokens:
        """(n, L) bool, the tokens of edges."""
        return np.cumsum((tokens > 0) & (tokens < self.words.first), axis=1) == 0

    def _cycles(self, tokens: strings.Tokens) -> random.Keys:
        """(n,) one number for each cycle, whatever the order of its edges and the questions."""
        edges = self._edges(tokens) & (tokens > 0)
        numbers, place = self.words.read(np.where(edges, tokens, 0))
        row, at = (numbers >= 0).nonzero()
        ends = np.full((len(tokens), 2 * self.config.max_nodes), -1)
        ends[row, place[row, at]] = numbers[row, at]
        pairs = ends.reshape(len(tokens), -1, 2)
        codes = random.mix(pairs[:, :, 0] * self.words.number + pairs[:, :, 1] + 1)
        return np.where(pairs[:, :, 0] >= 0, codes, 0).sum(1, dtype=np.uint64)

    def problems(self, batch: Batch) -> Tensor:
        """Cycles, in any order of their edges and with any questions."""
        return names_of(self._cycles(batch.inputs.cpu().numpy()))

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        inputs = batch.inputs[row].tolist()
        begin = next(i for i, token in enumerate(inputs) if 0 < token < self.words.first)
        names = self._spoken(inputs[:begin])
        edges = dict(zip(names[::2], names[1::2], strict=True))
        cycle = [names[0]]
        while (after := edges[cycle[-1]]) != names[0]:
            cycle.append(after)
        lines = [
            "edges      " + "  ".join(f"{a}>{b}" for a, b in edges.items()),
            "cycle      " + " > ".join([*cycle, cycle[0]]),
        ]
        scored = batch.targets[row] >= 0
        said = batch.targets[row] if predictions is None else predictions[row]
        for at in (i for i, token in enumerate(inputs) if token == _EQUALS):
            mark = max(i for i in range(at) if 0 < inputs[i] < self.words.first)
            end = at
            while end < len(scored) and scored[end]:
                end += 1
            true = "".join(self._spoken(batch.targets[row, at:end].tolist()))
            guess = "".join(map(self.spell, said[at:end].tolist())) if predictions is not None else true
            told = "" if predictions is None else f"    predicted {guess}{'' if guess == true else '!'}"
            asked = "".join(self._spoken(inputs[mark + 1 : at]))
            lines.append(f"{inputs[mark] - _HOPS + 1} from {asked}: {true}{told}")
        return "\n".join(lines)

    def _spoken(self, tokens: list[int]) -> list[str]:
        """Words of letters as text."""
        words, word = [], ""
        for token in tokens:
            word += self.spell(token)
            if token >= self.words.last:
                words.append(word)
                word = ""
        return words

    def spell(self, token: int) -> str:
        if token <= _EQUALS:
            return ".="[token] if token >= 0 else "?"
        if token < self.words.first:
            return f"+{token - _HOPS + 1}"
        return self.words.name(token) if token < self.vocab_size else "?"
