"""Formal languages (Deletang et al., ICLR 2023; in the form of Beck et al., "xLSTM", NeurIPS 2024, appendix D)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register

Lengths = tuple[PositiveInt, PositiveInt]

_PLUS, _MINUS, _TIMES, _EQUALS, _NUMBER = 1, 2, 3, 4, 5
_OF_LANGUAGE = {"max_step": "cycle_nav", "cycle_size": "cycle_nav", "modulus": "modular_arithmetic"}


@register("formal_language")
class FormalLanguage(Task):
    """Read a string of a formal language, then answer one question about the whole string.

    language="modular_arithmetic", seq_len=10, as a person sees it and as tokens (`.` is `IGNORE`):

        ```
                  2  *  3  +  4  =
        inputs    7  3  8  1  9  4  0  0  0  0
        targets   .  .  .  .  .  5  .  .  .  .      2 * 3 + 4 = 0 modulo 5, and 5 is the token of 0
        ```

    `parity`: whether the number of ones is odd. `even_pairs`: whether the number of pairs ab and ba is even, which is
    true if the last symbol equals the first. `cycle_nav`: the place on a cycle after random steps of up to `max_step`
    in either direction. `modular_arithmetic`: the value of an expression, products first; with `brackets`, of `(left op
    right)` nested at random (Deletang et al.), which is not a regular language: it needs a stack.

    Lengths count the tokens that are read, with `=` and without the answer. They are uniform over the lengths that the
    language has (without brackets, expressions have even lengths). A string is always in the same split, at any lengths
    of the splits. 0 is padding. The score has `scaled`, (accuracy - chance) / (1 - chance) with chance one over the
    number of answers. Slices: `length`, rounded up to the next of 4, 6, 8, 12, 16, 24, ...
    """

    class Config(Options):
        """Options of `formal_language`."""

        language: Literal["parity", "even_pairs", "cycle_nav", "modular_arithmetic"] = "parity"
        """Which of the languages above."""
        min_length: PositiveInt = 3
        """Shortest string."""
        max_length: PositiveInt = 40
        """Longest string."""
        validation_lengths: Lengths | None = None
        """Shortest and longest string of validation, by default those of training."""
        test_lengths: Lengths | None = None
        """Shortest and longest string of test, by default those of training."""
        answers: strings.Answers = "last"
        """Targets at the end only, or after every symbol (expressions without brackets: every number) too."""
        max_step: PositiveInt = 1
        """Longest step of `cycle_nav`."""
        cycle_size: Annotated[int, Field(ge=2)] = 5
        """Places on the cycle of `cycle_nav`."""
        modulus: Annotated[int, Field(ge=2, le=1000)] = 5
        """Modulus of `modular_arithmetic`."""
        brackets: bool = False
        """Nested expressions for `modular_arithmetic`."""

        @field_validator("validation_lengths", "test_lengths", mode="before")
        @classmethod
        def _from_list(cls, value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

    layout = "next_token"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        for option, language in {**_OF_LANGUAGE, "brackets": "modular_arithmetic"}.items():
            if option in c.changed() and c.language != language:
                raise UsageError(
                    f"formal_language: {option} is an option of language={language!r}, not {c.language!r}."
                )
        if c.brackets and c.answers == "all":
            raise UsageError('formal_language: half a bracketed expression has no value: take answers="last".')
        self._lengths = {
            "train": self._allowed("min_length and max_length", (c.min_length, c.max_length)),
            "validation": self._allowed("validation_lengths", c.validation_lengths or (c.min_length, c.max_length)),
            "test": self._allowed("test_lengths", c.test_lengths or (c.min_length, c.max_length)),
        }
        self.seq_len = max(int(lengths[-1]) for lengths in self._lengths.values())
        self._symbols, self._answers = self._names()
        self.vocab_size = 1 + max(*self._symbols, *self._answers)
        self.chance = 1 / len(self._answers)

    def _allowed(self, option: str, bounds: tuple[int, int]) -> NDArray[np.int64]:
        """The lengths from which those of a split are drawn."""
        c, (low, high) = self.config, bounds
        if low > high:
            raise UsageError(f"formal_language: {option}=({low}, {high}) should be the shortest, then the longest.")
        expression = c.language == "modular_arithmetic"
        lengths = np.arange(low, high + 1)
        if expression:  # at least a number and `=`
            lengths = lengths[(lengths > 1) & ((lengths % 2 == 0) | c.brackets)]
        instances = sum(self._instances(min(length, 50)) for length in lengths.tolist())
        strings.check_instances(self.name, instances, f"{option}=({low}, {high})")
        return lengths

    def _instances(self, length: int) -> float:
        """The number of different strings of a length; for bracketed expressions, a lower bound."""
        c = self.config
        if c.language != "modular_arithmetic":
            return float(2 * c.max_step + 1 if c.language == "cycle_nav" else 2) ** length
        numbers = (length + 8) // 7 if c.brackets else length // 2  # k numbers take up to 7k - 3 tokens and `=`
        return (3.0 * c.modulus) ** numbers / 3

    def _names(self) -> tuple[dict[int, str], dict[int, str]]:
        """What is written for each input token and for each answer."""
        c = self.config
        if c.language == "parity":
            return ({1: "0", 2: "1"},) * 2
        if c.language == "even_pairs":
            return {1: "a", 2: "b"}, {1: "even", 2: "odd"}
        if c.language == "cycle_nav":
            steps = [0, *range(1, c.max_step + 1), *range(-1, -c.max_step - 1, -1)]
            places = {1 + len(steps) + i: str(i) for i in range(c.cycle_size)}
            return {1 + i: f"{step:+d}" if step else "0" for i, step in enumerate(steps)}, places
        numbers = {_NUMBER + i: str(i) for i in range(c.modulus)}
        signs = {_PLUS: "+", _MINUS: "-", _TIMES: "*", _EQUALS: "="}
        if c.brackets:
            signs |= {_NUMBER + c.modulus: "(", _NUMBER + c.modulus + 1: ")"}
        return signs | numbers, numbers

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        keys = random.row_keys(split, seed, start, n)
        inputs = strings.draw_for_split(keys, split, lambda k: self._strings(k, split))
        lengths = (inputs > 0).sum(1)
        values, asked = self._values(inputs)
        targets = strings.answers_at(values, asked, self.config.answers)
        buckets = torch.from_numpy(strings.length_bucket(lengths))
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), {"length": buckets})

    def _strings(self, keys: random.Keys, split: Split) -> strings.Tokens:
        """(n, L) strings from keys (n,)."""
        c, allowed = self.config, self._lengths[split]
        lengths = allowed[random.below(random.fold(keys, 0), len(allowed))]
        words, width = random.fold(keys, 1), int(allowed[-1])
        if c.brackets:
            from zoo.tasks.kernels import expression

            tokens = np.zeros((len(keys), width), dtype=np.int64)
            expression.write(lengths - 1, c.modulus, words, tokens)
            np.put_along_axis(tokens, lengths[:, None] - 1, _EQUALS, axis=1)
            return tokens
        bits = random.bits(words, width)
        place = np.arange(width)
        if c.language == "modular_arithmetic":
            tokens = np.empty((len(keys), width), dtype=np.int64)
            tokens[:, ::2] = _NUMBER + random.below(bits[:, ::2], c.modulus)
            tokens[:, 1::2] = 1 + random.below(bits[:, 1::2], 3)
            tokens[place == lengths[:, None] - 1] = _EQUALS
        else:
            tokens = 1 + random.below(bits, len(self._symbols))
        tokens[place >= lengths[:, None]] = 0
        return tokens

    def _values(self, inputs: strings.Tokens) -> tuple[strings.Tokens, NDArray[np.bool_]]:
        """The answer after each token, and the positions where it can be a target."""
        c = self.config
        inside = inputs > 0
        if c.language == "parity":
            return 1 + np.cumsum(inputs == 2, axis=1) % 2, inside
        if c.language == "even_pairs":
            return 1 + (inputs != inputs[:, :1]), inside
        if c.language == "cycle_nav":
            steps = np.where(inputs <= 1 + c.max_step, inputs - 1, 1 + c.max_step - inputs)
            return 2 + 2 * c.max_step + np.cumsum(np.where(inside, steps, 0), axis=1) % c.cycle_size, inside
        if c.brackets:
            from zoo.tasks.kernels import expression

            return _NUMBER + np.tile(
                expression.evaluate(inputs, c.modulus)[:, None], inputs.shape[1]
            ), inputs == _EQUALS
        return _NUMBER + _prefix_values(inputs, c.modulus), (inputs >= _NUMBER) | (inputs == _EQUALS)

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`scaled`: 0 for guessing, 1 for all right."""
        return {"scaled": strings.scaled(batch, predictions, self.chance)}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        length = sum(token > 0 for token in inputs)
        said = None if predictions is None else [self._answers.get(p, "?") for p in predictions[row, :length].tolist()]
        return strings.picture(
            [self._symbols[token] for token in inputs[:length]],
            ["" if target == IGNORE else self._answers[target] for target in targets[:length]],
            said,
            (self.config.language.replace("_", " "), "answer"),
        )


def _prefix_values(inputs: strings.Tokens, modulus: int) -> strings.Tokens:
    """(n, L) value, products first, of each expression up to and with each of its tokens."""
    n, width = inputs.shape
    values = np.zeros((n, width), dtype=np.int64)
    total, term = np.zeros((2, n), dtype=np.int64)
    sign = np.full(n, _PLUS)
    for at in range(0, width, 2):
        number = inputs[:, at] - _NUMBER
        times = sign == _TIMES
        total = np.where(times, total, total + term) % modulus
        term = np.where(times, term * number, np.where(sign == _MINUS, -number, number)) % modulus
        values[:, at : at + 2] = ((total + term) % modulus)[:, None]
        if at + 1 < width:
            sign = inputs[:, at + 1]
    return values
