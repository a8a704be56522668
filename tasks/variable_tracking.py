"""Variables assigned to one another along chains (Hsieh et al., "RULER", COLM 2024), with a small vocabulary."""

from __future__ import annotations

import math

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.haystack import Haystack, HaystackOptions, Needles, Vocabulary
from zoo.tasks.protocol import register


@register("variable_tracking")
class VariableTracking(Haystack):
    """Name every variable that has a given value, directly or through other variables.

    With seq_len=18, n_chains=2, n_hops=1, filler_vocab=4, name_vocab=6, value_vocab=4, as a person sees it and as
    tokens (1 is `?`, 2 is `=`, fillers are 3 to 6, names 7 to 12, values 13 to 16, `.` is `IGNORE`):

        ```
                 n0  = v0 n1  = v1       n5  = n0    n4  = n1  ? v0
        inputs    7  2 13  8  2 14  6  6 12  2  7  5 11  2  8  1 13  7
        targets   .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  7 12
        ```

    A chain is `n_hops` + 1 statements: a variable gets a value, a second one gets the first, a third the second, ...
    The statements of a chain are hidden in this order; `n_chains` chains, with different variables and values, are
    mixed at random. The question is the value of one chain, which is at the places that `depth` sets (the others are
    anywhere); the answer is its variables, in order.

    Chance is one in `name_vocab` for each token. Rows in different splits differ in their statements, their places or
    the question. The score has `contained`, the share of variables that are somewhere in the answer, the figure
    published as RULER's. Slices: `depth`, the tenth of the haystack, from 0 to 9, with the first statement of the
    chain in question, and `length`.
    """

    class Config(HaystackOptions):
        """Options of `variable_tracking`."""

        n_chains: PositiveInt = 1
        """Number of chains in the haystack."""
        n_hops: NonNegativeInt = 4
        """Statements of a chain after the first."""
        name_vocab: PositiveInt = 32
        """Number of names of variables, at least n_chains * (n_hops + 1)."""
        value_vocab: PositiveInt = 32
        """Number of values, at least n_chains."""

    config: Config
    needle_length = 3
    has_depth = True

    @staticmethod
    def written(references: tuple[str, ...]) -> str:
        return " ".join(references)

    def _prepare(self) -> None:
        c = self.config
        self._links = c.n_hops + 1
        for option, count, needed in (
            ("name_vocab", c.name_vocab, c.n_chains * self._links),
            ("value_vocab", c.value_vocab, c.n_chains),
        ):
            if count < needed:
                told = f"n_chains={c.n_chains} with n_hops={c.n_hops}, which take {needed}"
                raise UsageError(f"variable_tracking: {option}={count} is too few for {told}.")
        self.vocabulary = Vocabulary(
            question=["?"], equals=["="], filler=c.filler_vocab, name=c.name_vocab, value=c.value_vocab
        )
        self.question_length, self.answer_length = 2, self._links
        statements = c.n_chains * self._links
        self.require_room(3 * statements, f"{statements} statements of 3 tokens")
        self.chains = np.repeat(np.arange(c.n_chains), self._links)
        self.steered = self.chains == 0
        asked = float(math.perm(c.name_vocab, min(self._links, 20)) * c.value_vocab)
        self.require_instances(asked, f"name_vocab={c.name_vocab} with n_hops={c.n_hops}")

    def _needles(self, keys: random.Keys) -> Needles:
        c, n, first = self.config, len(keys), self.vocabulary.first
        names = first["name"] + random.distinct(random.fold(keys, 0), len(self.chains), c.name_vocab)
        values = first["value"] + random.distinct(random.fold(keys, 1), c.n_chains, c.value_vocab)
        sources = np.roll(names, 1, axis=1)
        sources[:, :: self._links] = values
        return Needles(
            np.stack([names, np.full_like(names, first["equals"]), sources], axis=2),
            np.broadcast_to(self.steered, names.shape),
            np.stack([np.full(n, first["question"]), values[:, 0]], axis=1),
            names[:, : self._links],
        )
