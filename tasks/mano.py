"""Mano, the manipulation of knowledge: arithmetic modulo a prime (Allen-Zhu 2025, arXiv 2512.17351; after the code of
PhysicsLM4)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, names_of, register

_SIGNS = "+-*/"
_EQUALS, _LENGTH = 5, 6
_REDRAWS = 1000


@register("mano")
class Mano(Task):
    """Evaluate an expression modulo a number, in prefix notation, at once.

    With max_operators=2, modulus=5, as a person sees it and as tokens (1 to 4 are `+ - * /`, 5 is `=`, 6 and 7 say how
    many operators there are, numbers are 8 to 12, `.` is `IGNORE`):

        ```
                  :2  -  3  *  3  2  =
        inputs     7  2 11  3 11 10  5
        targets    .  .  .  .  .  . 10      3 - 3 * 2 = 2 modulo 5, and 10 is the token of 2
        ```

    The first token is the number of operators: in training uniform from 1 to `max_operators`, in the other splits
    always `max_operators`. Of k operators the first has 0 to k - 1 of the others on its left side, uniform; numbers are
    uniform. The model memorises the tables of sums and products, and uses them without written steps. The authors have
    modulus=23 and max_operators=10 (13, 16). They also write every sign in two ways, which they found to matter little;
    here there is one.

    An expression is in one split, whichever way round the sides of + and * are. The score has `scaled`, (accuracy -
    chance) / (1 - chance), where chance is the share of the most frequent value of held-out rows, which is 0 if there
    are products. Slices: `operators` and `depth`, the most operators within one another.
    """

    class Config(Options):
        """Options of `mano`."""

        max_operators: Annotated[int, Field(ge=1, le=1000)] = 4
        """Most operators of an expression, and the operators of held-out expressions."""
        modulus: Annotated[int, Field(ge=2, le=1000)] = 23
        """Number of different values."""
        operators: str = "+-*"
        """Which operators, each once: of `+-*/`. Division needs a modulus that is prime; nothing is divided by 0."""

        @field_validator("operators")
        @classmethod
        def _known(cls, value: str) -> str:
            if not value or len(set(value)) < len(value) or not set(value) <= set(_SIGNS):
                raise UsageError(f"mano: operators={value!r} is not allowed: write each at most once, such as '+-*'.")
            return value

    layout = "next_token"
    continues = True
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self._number = _LENGTH + c.max_operators
        """The token of 0."""
        self.vocab_size = self._number + c.modulus
        self.seq_len = 2 * c.max_operators + 3
        self._inverses = np.zeros(c.modulus, dtype=np.int64)
        values = np.arange(c.modulus)
        product = values[:, None] * values % c.modulus
        row, at = (product == 1).nonzero()
        self._inverses[row] = at
        if "/" in c.operators and not self._inverses[1:].all():
            raise UsageError(f"mano: modulus={c.modulus} with operators={c.operators!r} should be a prime number.")
        self._operators = np.array([1 + _SIGNS.index(sign) for sign in c.operators])
        instances = float(len(c.operators)) ** c.max_operators * float(c.modulus) ** min(c.max_operators + 1, 50)
        told = f"max_operators={c.max_operators}, modulus={c.modulus} with operators={c.operators!r}"
        strings.check_instances(self.name, instances / 2**c.max_operators, told)
        self.chance = float(self._shares().max())

    def _shares(self) -> NDArray[np.float64]:
        """(modulus,) the probability of each value of a held-out expression."""
        m = self.config.modulus
        values = np.arange(m)
        a, b = np.meshgrid(values, values, indexing="ij")
        tables = {"+": (a + b) % m, "-": (a - b) % m, "*": a * b % m, "/": a * self._inverses[b] % m}
        shares = [np.full(m, 1 / m)]
        for k in range(1, self.config.max_operators + 1):
            pairs = np.sum([np.outer(shares[left], shares[k - 1 - left]) for left in range(k)], axis=0)
            share = np.zeros(m)
            for sign in self.config.operators:
                kept = np.where(self._inverses[b] > 0, pairs, 0) if sign == "/" else pairs
                share += np.bincount(tables[sign].ravel(), kept.ravel(), minlength=m)
            shares.append(share / k / len(self.config.operators))  # less than 1 where some divide by 0
        return shares[-1] / shares[-1].sum()

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        inputs = strings.draw_for_split(
            random.row_keys(split, seed, start, n), split, lambda keys: self._texts(keys, split), self._names
        )
        values, depths, _ = self._evaluated(inputs)
        operators = (self._lengths(inputs) - 1) // 2
        targets = np.full_like(inputs, IGNORE)
        np.put_along_axis(targets, 2 + 2 * operators[:, None], self._number + values[:, None], axis=1)
        slices = {"operators": torch.from_numpy(operators), "depth": torch.from_numpy(depths)}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)

    def _texts(self, keys: random.Keys, split: Split) -> strings.Tokens:
        """(n, L) numbers of operators, expressions and `=`."""
        from zoo.tasks.kernels import prefix

        c = self.config
        counts = np.full(len(keys), c.max_operators)
        if split == "train":
            counts = 1 + random.below(random.bits(random.fold(keys, 0), 1)[:, 0], c.max_operators)
        tokens = np.zeros((len(keys), self.seq_len), dtype=np.int64)
        tokens[:, 0] = _LENGTH - 1 + counts
        np.put_along_axis(tokens, 2 + 2 * counts[:, None], _EQUALS, axis=1)
        left = np.arange(len(keys))
        for attempt in range(_REDRAWS):
            drawn = np.zeros((len(left), self.seq_len - 2), dtype=np.int64)
            words = random.fold(keys[left], 1 + attempt)
            prefix.write(counts[left], self._operators, c.modulus, self._number, words, drawn)
            defined = prefix.evaluate(drawn, self._inverses, self._number)[0] >= 0
            rows = left[defined]
            tokens[rows, 1:-1] += drawn[defined]
            left = left[~defined]
            if not len(left):
                return tokens
        raise UsageError(f"mano: nearly every expression with max_operators={c.max_operators} divides by 0.")

    def _lengths(self, tokens: strings.Tokens) -> strings.Tokens:
        """(n,) tokens of the expressions."""
        return 2 * (tokens[:, 0] - _LENGTH + 1) + 1

    def _evaluated(self, tokens: strings.Tokens) -> tuple[strings.Tokens, strings.Tokens, random.Keys]:
        from zoo.tasks.kernels import prefix

        expressions = np.where(tokens == _EQUALS, 0, tokens)[:, 1:]
        return prefix.evaluate(np.ascontiguousarray(expressions), self._inverses, self._number)

    def _names(self, tokens: strings.Tokens) -> random.Keys:
        return self._evaluated(tokens)[2]

    def problems(self, batch: Batch) -> Tensor:
        """Expressions, whichever way round the sides of + and * are."""
        return names_of(self._names(batch.inputs.cpu().numpy()))

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`scaled`: 0 for the most frequent value, 1 for all right."""
        return {"scaled": strings.scaled(batch, predictions, self.chance)}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        scored = batch.targets[row] != IGNORE
        tokens = [token for token in batch.inputs[row, 1:].tolist() if token and token != _EQUALS]
        lines = [
            "prefix     " + " ".join(map(self.spell, tokens)),
            f"means      {self._infix(tokens)}  modulo {self.config.modulus}",
            f"answer     {self.spell(int(batch.targets[row][scored]))}",
        ]
        if predictions is not None:
            lines.append(f"predicted  {self.spell(int(predictions[row][scored]))}")
        return "\n".join(lines)

    def _infix(self, tokens: list[int]) -> str:
        stack: list[str] = []
        for token in reversed(tokens):
            if token >= self._number:
                stack.append(self.spell(token))
            else:
                stack.append(f"({stack.pop()} {self.spell(token)} {stack.pop()})")
        return stack[0].removeprefix("(").removesuffix(")") if len(tokens) > 1 else stack[0]

    def spell(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return "?"
        if token < _LENGTH:
            return f".{_SIGNS}="[token]
        return f":{token - _LENGTH + 1}" if token < self._number else str(token - self._number)
