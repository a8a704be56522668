"""Brevo, the breadth of reasoning: all ancestors of a node, in order (Allen-Zhu 2025, arXiv 2512.17351; after the code
of PhysicsLM4)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from zoo.tasks import random, strings
from zoo.tasks.graph_words import FEWEST_NODES, WordOptions, Words, sizes
from zoo.tasks.protocol import Batch, Split, Task, check_request, names_of, register, take

_QUESTION, _EQUALS, _LETTER = 1, 2, 3
_MOST_EDGES = 4  # into a node


@register("brevo")
class Brevo(Task):
    """Write all nodes on which a node of a graph depends, each behind all those on which it depends itself.

    With max_nodes=6, letters=8, as a person sees it and as tokens (1 is `?`, 2 is `=`, words are 3 to 10, `.` is
    `IGNORE`):

        ```
                  7>0   0>5   5>4   7>4   7>5  ? 4  =  7  0  5     4
        inputs   10  3  3  8  8  7 10  7 10  8  1  7  2 10  3  8  0 ...
        targets   .  .  .  .  .  .  .  .  .  .  .  . 10  3  8  7  . ...
        ```

    A row is the edges of a directed graph without cycles, in random order, then the question and its answer: the node
    in question comes last. In training the graph has 3 to `max_nodes` nodes, i of them with a probability proportional
    to 1 / (i + sqrt(max_nodes)); held-out graphs have `max_nodes`. A node has edges from up to 4 nodes and to up to 4.
    The first node of an answer takes all of the graph into account, since the model writes nothing before it.

    Many orders may be right: the target is one of them, drawn at random. `exact` is the share of answers that are a
    right order, whichever. Read it where the model reads its own answer (`objective.free_running=true`): behind the
    true words a model that could write a right order may leave it at each word. `accuracy` is for reading behind the
    true words: the share of words that may come next there, or, in an answer that is right, of all words.

    Nodes are named by words of random letters. The authors' Brevo1 has max_nodes=70 (90, 110) and as many letters;
    their Brevo2 has max_nodes=30 (40, 50), letters=4, min_word=2, max_word=4. They write an end behind the answer,
    which is left out here, since the node in question ends it.

    A graph with its question is in one split, whatever its nodes are called and in any order of its edges. Slices:
    `depth`, the edges from the node in question back to the nearest node without an edge in, `ancestors`, how many
    nodes the answer has, and `nodes`; the last two are rounded up to the next of 1, 2, 3, 4, 6, 8, 12, 16, ...
    """

    class Config(WordOptions):
        """Options of `brevo`."""

        max_nodes: Annotated[int, Field(ge=FEWEST_NODES + 3)] = 10
        """Nodes of the largest graph, and of held-out graphs."""

    layout = "next_token"
    continues = True
    many_answers = "one of the right orders, at random"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.words = Words(self.name, c, _LETTER, c.max_nodes)
        self.vocab_size = self.words.vocab_size
        self.most_edges = sum(min(node, _MOST_EDGES) for node in range(c.max_nodes))
        self.seq_len = c.max_word * (2 * self.most_edges + 1 + c.max_nodes) + 1

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        from zoo.tasks.kernels import dag

        check_request(n, split, start)
        tokens = strings.draw_for_split(
            random.row_keys(split, seed, start, n), split, lambda keys: self._texts(keys, split), self._names
        )
        asked = self._answered(tokens)
        inputs, targets = strings.continued(tokens, asked)
        edges, query = self._graphs(tokens)
        nodes, depths = dag.sizes(edges, query)
        ancestors = (asked & self.words.is_last(tokens)).sum(1)
        slices = {
            "depth": depths,
            "ancestors": strings.length_bucket(ancestors),
            "nodes": strings.length_bucket(nodes),
        }
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {k: torch.from_numpy(v) for k, v in slices.items()}
        )

    def _texts(self, keys: random.Keys, split: Split) -> strings.Tokens:
        """(n, L + 1) edges, question and answer."""
        from zoo.tasks.kernels import dag

        c, n = self.config, len(keys)
        nodes = sizes(random.fold(keys, 0), c.max_nodes, split)
        edges = np.full((n, self.most_edges, 2), -1)
        order = np.full((n, c.max_nodes), -1)
        dag.write(nodes, random.fold(keys, 1), edges, order)
        names = self.words.draw(random.fold(keys, 2), c.max_nodes)

        def spelt(which: strings.Tokens) -> strings.Tokens:
            flat = which.reshape(n, -1)
            called = np.take_along_axis(names, np.maximum(flat, 0), axis=1)
            return self.words.spelt(np.where(flat >= 0, called, -1)).reshape(n, -1)

        marks = (np.full((n, 1), mark) for mark in (_QUESTION, _EQUALS))
        query = spelt(nodes[:, None] - 1)
        return strings.packed(np.concatenate([spelt(edges), next(marks), query, next(marks), spelt(order)], axis=1))

    def _answered(self, tokens: strings.Tokens) -> NDArray[np.bool_]:
        """(n, L) bool, the tokens of answers."""
        return (np.cumsum(tokens == _EQUALS, axis=1) > 0) & (tokens >= _LETTER)

    def _graphs(self, tokens: strings.Tokens) -> tuple[strings.Tokens, strings.Tokens]:
        """Edges (n, E, 2) between numbers of words, filled up with -1, and the node in question (n,) of rows."""
        behind = np.cumsum(tokens == _QUESTION, axis=1) > 0
        numbers, place = self.words.read(np.where(behind, 0, tokens))
        row, at = (numbers >= 0).nonzero()
        ends = np.full((len(tokens), 2 * self.most_edges), -1)
        ends[row, place[row, at]] = numbers[row, at]
        asked = np.where(behind & (np.cumsum(tokens == _EQUALS, axis=1) == 0), tokens, 0)
        return ends.reshape(len(tokens), -1, 2), self.words.read(asked)[0].max(1)

    def _names(self, tokens: strings.Tokens) -> random.Keys:
        from zoo.tasks.kernels import dag

        return dag.names(*self._graphs(tokens))

    def problems(self, batch: Batch) -> Tensor:
        """Graphs with their question, whatever their nodes are called and in any order of their edges."""
        return names_of(self._names(batch.inputs.cpu().numpy()))

    def _said(self, batch: Batch, answers: Tensor, *, aligned: bool) -> strings.Tokens:
        """(n, A) numbers of the words of answers, -2 for what is no word, and -1 behind the end; `aligned` to the true
        words, each by the tokens in its place."""
        scored = batch.scored.cpu().numpy()
        said = np.where(scored, answers.cpu().numpy(), 0)
        letters = (said >= _LETTER) & (said < self.vocab_size)
        said = np.where(letters, said, 0)
        numbers, place = self.words.read(said)
        ends = numbers >= 0
        wrong = scored & ~letters
        if aligned:
            ends = self.words.is_last(np.where(scored, batch.targets.cpu().numpy(), 0))
            place = np.cumsum(ends, axis=1) - ends
            wrong |= ends != (numbers >= 0)
        found = np.full((len(said), self.config.max_nodes * self.config.max_word), -1)
        for at, values in ((ends, numbers), (wrong, np.full_like(said, -2))):
            row, column = at.nonzero()
            found[row, place[row, column]] = values[row, column]
        return found

    def _followed(self, batch: Batch, answers: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether answers are a right order (n,), and whether each word (n, A) may follow the true words before it."""
        from zoo.tasks.kernels import dag

        edges, query = self._graphs(batch.inputs.cpu().numpy())
        true, near = (self._said(batch, each, aligned=True) for each in (batch.targets, answers))
        whole, _ = dag.follow(edges, query, true, self._said(batch, answers, aligned=False))
        return whole, dag.follow(edges, query, true, near)[1]

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        return torch.from_numpy(self._followed(batch, answers)[0]).to(answers.device)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        whole, steps = self._followed(batch, answers)
        ends = self.words.is_last(batch.targets.cpu().numpy())
        place = np.minimum(np.cumsum(ends, axis=1) - ends, steps.shape[1] - 1)
        right = np.take_along_axis(steps, place, axis=1) | whole[:, None]
        return torch.from_numpy(right).to(answers.device)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        inputs = batch.inputs[row].tolist()
        question, equals = inputs.index(_QUESTION), inputs.index(_EQUALS)
        names = self._spoken(inputs[:question])
        scored = batch.scored[row]
        lines = {
            "edges": "  ".join(f"{a}>{b}" for a, b in zip(names[::2], names[1::2], strict=True)),
            "question": "what comes before " + "".join(self._spoken(inputs[question + 1 : equals])),
            "answer": " ".join(self._spoken(batch.targets[row][scored].tolist())),
        }
        if predictions is not None:
            lines["predicted"] = " ".join(self._spoken(predictions[row][scored].tolist()))
            right = self.is_right(take(batch, slice(row, row + 1)), predictions[row : row + 1])
            lines[""] = "a right order" if right else "no right order"
        return "\n".join(f"{name:<11}{text}" for name, text in lines.items())

    def _spoken(self, tokens: list[int]) -> list[str]:
        """Words of letters as text."""
        words, word = [], ""
        for token in tokens:
            word += self.spell(token)
            if token >= self.words.last or token < _LETTER:
                words.append(word)
                word = ""
        return [*words, word] if word else words

    def spell(self, token: int) -> str:
        if token < _LETTER:
            return ".?="[token] if token >= 0 else "?"
        return self.words.name(token) if token < self.vocab_size else "?"
