"""Lano, the structure of language: strings of a context-free grammar (Allen-Zhu 2025, arXiv 2512.17351, and Allen-Zhu
and Li 2023, arXiv 2305.13673; after the family cfg3 in the code of PhysicsLM4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import Batch, Split, Task, check_request, register
from zoo.tasks.scores import LOWER_IS_BETTER

_SHORTEST, _LONGEST = 2, 3  # symbols of a rule


@register("lano")
class Lano(Task):
    """Write strings of a context-free grammar, which the model learns from them alone.

    With depth=3, as a person sees it and as tokens (1 to 3 are the letters, 4 is the start and the end, `.` is
    `IGNORE`):

        ```
                  | b c c c b c c a c a a a a
        inputs    4 2 3 3 3 2 3 3 1 3 1 1 1 1 0 ...
        targets   2 3 3 3 2 3 3 1 3 1 1 1 1 4 . ...
        ```

    The grammar has `depth` levels of `symbols` symbols below one root. A symbol has `min_rules` to `max_rules` rules,
    each as probable as the others: sequences of 2 or 3 symbols of the next level, no two of a level the same. Symbols
    of the last level are the letters. So a string has 2 ** depth to 3 ** depth letters, and its structure is written
    nowhere. One grammar for all splits follows from `grammar_seed`. The authors' cfg3f has depth=6 (their cfg3k 7) and
    the defaults of the other options. Their rules are in files; the rules here are drawn in the same way.

    A string is in one split. The score has `possible`, the share of predicted tokens that the grammar allows behind the
    true tokens before them; random letters have about 0.87 with the defaults. An evaluation adds `floor`, the loss of
    the grammar's own probabilities on these rows, and `excess`, by how much the loss of `next_token` is above it: in
    the mean over all rows the divergence (KL) of the model from the grammar, in nats a token. `accepts` says which
    strings are the grammar's. Slices: `length`, rounded up to the next of 4, 6, 8, 12, 16, 24, ...
    """

    class Config(Options):
        """Options of `lano`."""

        depth: Annotated[int, Field(ge=3, le=6)] = 4
        """Levels below the root."""
        symbols: Annotated[int, Field(ge=2, le=26)] = 3
        """Symbols of each level, and letters."""
        min_rules: Annotated[int, Field(ge=1, le=100)] = 3
        """Fewest rules of a symbol."""
        max_rules: Annotated[int, Field(ge=1, le=100)] = 4
        """Most rules of a symbol."""
        grammar_seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
        """Seed of the grammar."""

    layout = "next_token"
    is_language = True
    token_is_byte = False
    lower_is_better = LOWER_IS_BETTER | {"floor", "excess"}
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.min_rules > c.max_rules:
            raise UsageError(f"lano: min_rules={c.min_rules} is more than max_rules={c.max_rules}.")
        sequences = sum(c.symbols**length for length in range(_SHORTEST, _LONGEST + 1))
        if c.symbols * c.max_rules > sequences:
            told = f"symbols={c.symbols} with max_rules={c.max_rules} may need {c.symbols * c.max_rules} rules a level"
            raise UsageError(f"lano: {told}, and there are {sequences}.")
        self.end = c.symbols + 1
        """The token behind a string, and before it."""
        self.vocab_size = c.symbols + 2
        self.seq_len = _LONGEST**c.depth + 1
        self.rules, self.counts = self._grammar()
        derivations = np.ones(c.symbols)
        for rules, counts in zip(self.rules[::-1], self.counts[::-1], strict=True):
            each = np.where(rules >= 0, derivations[rules], 1.0).prod(2)
            derivations = np.where(np.arange(rules.shape[1]) < counts[:, None], each, 0.0).sum(1)
        told = f"depth={c.depth} with min_rules={c.min_rules}, max_rules={c.max_rules}, grammar_seed={c.grammar_seed}"
        strings.check_instances(self.name, derivations[0], told)

    def _grammar(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rules (depth, symbols, max_rules, 3), -1 where there is none, and their numbers (depth, symbols)."""
        c = self.config
        key = random.row_keys("train", c.grammar_seed, 0, 1)
        spread = c.max_rules - c.min_rules + 1
        drawn = random.below(random.bits(random.fold(key, 0), c.depth * c.symbols)[0], spread)
        counts = c.min_rules + drawn.reshape(c.depth, c.symbols)
        rules = np.full((c.depth, c.symbols, c.max_rules, _LONGEST), -1)
        for level in range(c.depth):
            taken: set[tuple[int, ...]] = set()
            for symbol in range(c.symbols):
                for k in range(counts[level, symbol]):
                    tried = 0
                    while True:
                        place = ((level * c.symbols + symbol) * c.max_rules + k) * 2**16 + tried
                        words = random.bits(random.fold(random.fold(key, 1), place), 1 + _LONGEST)[0]
                        size = _SHORTEST + int(random.below(words[:1], _LONGEST - _SHORTEST + 1)[0])
                        rule = tuple(random.below(words[1 : 1 + size], c.symbols).tolist())
                        if rule not in taken:
                            break
                        tried += 1
                    taken.add(rule)
                    rules[level, symbol, k, :size] = rule
        return rules, counts

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        letters = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._strings)
        lengths = (letters > 0).sum(1)
        tokens = np.pad(letters, ((0, 0), (1, 1)))
        tokens[:, 0] = self.end
        np.put_along_axis(tokens, 1 + lengths[:, None], self.end, axis=1)
        inputs, targets = strings.continued(tokens, tokens > 0)
        slices = {"length": torch.from_numpy(strings.length_bucket(lengths))}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)

    def _strings(self, keys: random.Keys) -> strings.Tokens:
        """(n, L - 1) letters from 1 on, padded with zeros."""
        from zoo.tasks.kernels import grammar

        tokens = np.zeros((len(keys), self.seq_len - 1), dtype=np.int64)
        grammar.write(self.rules, self.counts, keys, tokens)
        return tokens

    def _parsed(self, batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        from zoo.tasks.kernels import grammar

        return grammar.parse(np.ascontiguousarray(batch.inputs[:, 1:].cpu().numpy()), self.rules, self.counts)

    def accepts(self, texts: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each of these sequences of letters, without start and end, is a string of the grammar."""
        from zoo.tasks.kernels import grammar

        width = max([len(text) for text in texts] or [0])
        tokens = np.zeros((len(texts), width), dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = [token if 0 < token < self.end else -1 for token in text]
        return np.isfinite(grammar.parse(tokens, self.rules, self.counts)[0]).tolist()

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`possible`: the share of predicted tokens that may come next."""
        _, may = self._parsed(batch)
        said = predictions.cpu().numpy() - 1
        known = (said >= 0) & (said < self.end)
        right = np.take_along_axis(may, np.where(known, said, 0)[:, :, None], axis=2)[:, :, 0] & known
        scored = batch.scored.cpu().numpy()
        return {"possible": torch.from_numpy((right & scored).sum(1) / scored.sum(1))}

    def loss_figures(self, batch: Batch, loss: float) -> dict[str, float]:
        """`floor`, the loss of the grammar's own probabilities, and `excess`, how much a loss is above it."""
        floor = float(-self._parsed(batch)[0].sum() / int(batch.scored.sum()))
        return {"floor": floor, "excess": loss - floor}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        pairs = strings.named(batch, row, predictions, self.spell)
        size = int(batch.scored[row].sum())
        inputs, targets, said = (each and each[:size] for each in pairs)
        return strings.picture(inputs, targets, said, titles=("text", "next"))  # type: ignore[arg-type]

    def spell(self, token: int) -> str:
        if token == self.end:
            return "|"
        return ".abcdefghijklmnopqrstuvwxyz"[token] if 0 <= token < self.end else "?"
