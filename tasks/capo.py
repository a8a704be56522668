"""Capo, the capacity of knowledge: invented biographies to be memorised (Allen-Zhu 2025, arXiv 2512.17351; Allen-Zhu
and Li 2024, arXiv 2404.05405; after bioS in the code of PhysicsLM4)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.haystack import Vocabulary
from zoo.tasks.protocol import Batch, Split, Task, check_request, names_of, register

Size = Annotated[int, Field(ge=2)]

_SENTENCES = {"birth": ("month", "day", "year"), "city": ("city",), "school": ("school",), "field": ("field",)}
_SENTENCES |= {"work": ("company",)}
_VALUES = [value for values in _SENTENCES.values() for value in values]
_NAMES = ("first", "middle", "last")


@register("capo")
class Capo(Task):
    """Recall what invented people's biographies say, which the model memorises.

    With n_people=4, names=[2, 2, 2], templates=1 and order="fixed", as a person sees it and as tokens (7 to 11 open
    sentences, `.` is `IGNORE`):

        ```
                   name born month day year from city school      field      work
        inputs    2 3 5    7    12  30   83    8  126      9  173    10  204   11
        targets   . . .   12    30  83    .  126    .    173    .   204    .  232      the company
        ```

    There are `n_people` people, each with a name of three words and seven values in five sentences: a date of birth, a
    city, a school, a field and a company. All is uniform and independent, names are different, and all of it follows
    from `map_seed`. A row is one biography: the name, then the sentences in random order, each opened by one of
    `templates` tokens for its kind, in place of the authors' paraphrases. The values are scored. Every n_people rows
    show each person once, in random order: after k times n_people rows each has been seen k times.

    All splits have the same people, in other orders and with other templates: the score says what training has stored.
    The score has the share of right values of each sentence (`birth`, `city`, `school`, `field`, `work`). An evaluation
    adds `bits`: what the model knows of the values of all people. It is n_people times the difference of what there is
    to know (the log2 of the numbers of values) and the loss of these values in bits, and at least 0. Divided by the
    number of parameters it is the capacity. The authors count the names as well, which are given here. Their bioS has
    names=[400, 400, 1000] and values=[12, 28, 200, 200, 300, 100, 263], with a pronoun 47.6 bits a person, and each
    person is seen 100 or 1000 times.
    """

    class Config(Options):
        """Options of `capo`."""

        n_people: Annotated[int, Field(ge=4)] = 1000
        """Number of people."""
        names: tuple[Size, Size, Size] = (40, 40, 100)
        """Number of first, middle and last names."""
        values: tuple[Size, Size, Size, Size, Size, Size, Size] = (12, 28, 40, 40, 60, 20, 53)
        """Number of months, days, years, cities, schools, fields and companies."""
        templates: PositiveInt = 4
        """Number of tokens that open a sentence of each kind."""
        order: Literal["random", "fixed"] = "random"
        """Order of the sentences."""
        map_seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 12345
        """Seed of the people."""

        @field_validator("names", "values", mode="before")
        @classmethod
        def _from_list(cls, value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

    layout = "next_token"
    continues = True
    overlap = "All splits have the same people: what is measured is what training has stored."
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.n_people > math.prod(c.names):
            told = f"{math.prod(c.names)} names, fewer than n_people={c.n_people}"
            raise UsageError(f"capo: names={list(c.names)} make {told}.")
        openings = {f"{kind} sentence": c.templates for kind in _SENTENCES}
        names = {f"{name} name": size for name, size in zip(_NAMES, c.names, strict=True)}
        self.vocabulary = Vocabulary(**names, **openings, **dict(zip(_VALUES, c.values, strict=True)))
        self.vocab_size = len(self.vocabulary)
        self.seq_len = len(_NAMES) + len(_SENTENCES) + len(_VALUES) - 1
        first = self.vocabulary.first
        key = random.row_keys("train", c.map_seed, 0, 1)
        numbers = random.distinct(random.fold(key, 0), c.n_people, math.prod(c.names))[0]
        self._names = np.stack(np.unravel_index(numbers, c.names), 1) + [first[f"{name} name"] for name in _NAMES]
        drawn = random.bits(random.fold(key, 1), c.n_people * len(_VALUES)).reshape(c.n_people, -1)
        self._values = random.below(drawn, np.array(c.values)) + [first[name] for name in _VALUES]
        self.bits_per_person = sum(math.log2(size) for size in c.values)
        """What there is to know of a person, beside the name."""

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        c, first = self.config, self.vocabulary.first
        numbers = np.arange(start, start + n)
        epochs = random.fold(random.row_keys(split, seed, 0, 1), numbers // c.n_people)
        people = random.shuffled(epochs, numbers % c.n_people, c.n_people)
        keys = random.row_keys(split, seed, start, n)
        drawn = random.below(random.bits(random.fold(keys, 0), len(_SENTENCES)), c.templates)
        values = self._values[people]
        width = 1 + max(map(len, _SENTENCES.values()))
        sentences, at = np.zeros((n, len(_SENTENCES), width), dtype=np.int64), 0
        for i, (kind, parts) in enumerate(_SENTENCES.items()):
            sentences[:, i, 0] = first[f"{kind} sentence"] + drawn[:, i]
            sentences[:, i, 1 : 1 + len(parts)] = values[:, at : at + len(parts)]
            at += len(parts)
        if c.order == "random":
            order = np.argsort(random.bits(random.fold(keys, 1), len(_SENTENCES)), axis=1)
            sentences = np.take_along_axis(sentences, order[:, :, None], axis=1)
        tokens = strings.packed(np.concatenate([self._names[people], sentences.reshape(n, -1)], axis=1))
        tokens = tokens[:, : self.seq_len + 1]
        inputs, targets = strings.continued(tokens, tokens >= first["month"])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def problems(self, batch: Batch) -> Tensor:
        """People."""
        names = batch.inputs[:, : len(_NAMES)].cpu().numpy() - self.vocabulary.first["first name"]
        return names_of(random.mix(np.ascontiguousarray(names) @ [1, 2**20, 2**40]))

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """The share of right values of each sentence."""
        right, figures, first = predictions == batch.targets, {}, self.vocabulary.first
        for kind, parts in _SENTENCES.items():
            begin = first[parts[0]]
            end = begin + sum(self.config.values[_VALUES.index(part)] for part in parts)
            of_kind = (batch.targets >= begin) & (batch.targets < end)
            figures[kind] = (right & of_kind).sum(1).double() / of_kind.sum(1)
        return figures

    def loss_figures(self, batch: Batch, loss: float) -> dict[str, float]:
        """`bits`, which the model knows of the values of all people."""
        known = self.bits_per_person - len(_VALUES) * loss / math.log(2)
        return {"bits": self.config.n_people * max(known, 0.0)}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        return strings.picture(*strings.named(batch, row, predictions, self.spell), titles=("text", "values"))

    def spell(self, token: int) -> str:
        if not 0 < token < self.vocab_size:
            return "." if token == 0 else "?"
        kind, begin = max(((k, b) for k, b in self.vocabulary.first.items() if b <= token), key=lambda pair: pair[1])
        word, _, sort = kind.partition(" ")
        return f"{word}{'-' if sort == 'sentence' else ''}{token - begin}"
