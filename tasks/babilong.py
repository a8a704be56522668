"""Facts scattered in filler (Kuratov et al., "BABILong", NeurIPS 2024, after Weston et al., bAbI), in few words."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.haystack import Haystack, HaystackOptions, Needles, Tokens, Vocabulary
from zoo.tasks.protocol import IGNORE, Batch, register

_PEOPLE = ["Mary", "John", "Daniel", "Sandra"]
_PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
_THINGS = ["apple", "football", "milk"]
_COUNTS = ["none", "one", "two", "three"]

_FACTS = {"qa1": (2, 10), "qa2": (2, 68), "qa3": (4, 32), "qa7": (2, 52), "qa8": (2, 50)}
_KINDS = tuple(f"qa{number}" for number in range(1, 21))
_MADE = tuple(_FACTS)  # in the order in which the kernel numbers questions


@register("babilong")
class BABILong(Haystack):
    """Answer questions about a story whose facts are scattered in a long text.

    With seq_len=24, question="qa2", max_facts=4, as a person sees it and as tokens (`.` is `IGNORE`):

        ```
        f8 Mary went hallway ... Mary took apple f4 f13 f8 Sandra went office  ? apple

        inputs   14 22  3 29 10 14 21 21  9  9 15 14 18 22  4 32 10 19 14 25  3 31  1 32
        targets   .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  . 29     which is hallway
        ```

    A fact is a person, an action and a place or a thing. People go to places, take things that nobody carries and that
    are at their place (or have no place yet), and drop them at the place where they are. The `min_facts` to `max_facts`
    facts are hidden in order at the places that `depth` sets. Questions, by bAbI's numbers:

    - `qa1`, one supporting fact: where is a person?
    - `qa2`, two: where is a thing?
    - `qa3`, three: where was a thing before it came to the place where it is?
    - `qa7`, counting: how many things does a person carry?
    - `qa8`, lists: which things, in the order of taking? `|` ends the list, and follows `nothing` if it is empty.

    Chance is one in `places` for `qa1` and `qa2`, and one in `places` - 1 for `qa3`. Rows in different splits
    differ in their facts, their places or the question. The score has `labels`, whether the answer names the
    targets and nothing else, in any order, the figure published as BABILong's. Slices: `depth`, the tenth of the
    filler, from 0 to 9, with the first supporting fact, and `length`.
    """

    class Config(HaystackOptions):
        """Options of `babilong`."""

        question: Literal[_KINDS] = "qa1"  # type: ignore[valid-type]
        """The kind of question; qa1, qa2, qa3, qa7 and qa8 are generated, the others are read from files."""
        min_facts: PositiveInt | None = None
        """Fewest facts, by default BABILong's: 4 for qa3, else 2."""
        max_facts: PositiveInt | None = None
        """Most facts, by default BABILong's: 10, 68, 32, 52 and 50."""
        people: PositiveInt = 4
        """Number of people."""
        places: PositiveInt = 6
        """Number of places."""
        things: PositiveInt = 3
        """Number of things."""

    config: Config
    needle_length = 3
    figure = "labels"

    @property
    def _file_kind(self) -> str:
        return self.config.question

    def _prepare(self) -> None:
        c = self.config
        if c.question not in _FACTS:
            told = f"only read from files, by path; generated are {', '.join(_FACTS)}"
            raise UsageError(f"babilong: question={c.question!r} is {told}.")
        low, high = _FACTS[c.question]
        self._facts = low if c.min_facts is None else c.min_facts, high if c.max_facts is None else c.max_facts
        if self._facts[0] > self._facts[1]:
            raise UsageError(f"babilong: min_facts={self._facts[0]} is more than max_facts={self._facts[1]}.")
        if c.places < 2:
            raise UsageError(f"babilong: places={c.places} leaves nowhere to go: take at least 2.")
        self.vocabulary = Vocabulary(
            question=["?"],
            end=["|"],
            actions=["went", "took", "dropped"],
            filler=c.filler_vocab,
            people=_named(_PEOPLE, "person", c.people),
            places=_named(_PLACES, "place", c.places),
            things=_named(_THINGS, "thing", c.things),
            nothing=["nothing"],
            counts=_named(_COUNTS, "count", c.things + 1),
        )
        self.question_length = 3 if c.question == "qa3" else 2
        self.answer_length = max(c.things, 1) + 1 if c.question == "qa8" else 1
        most = self._facts[1]
        self.require_room(3 * most, f"max_facts={most} facts of 3 tokens")
        self.chains = np.zeros(most, dtype=np.int64)
        self.steered = np.ones(most, dtype=np.bool_)
        told = f"min_facts={self._facts[0]} with people={c.people} and places={c.places}"
        self.require_instances(float(c.people * (c.places - 1)) ** min(self._facts[0], 50), told)

    def _needles(self, keys: random.Keys) -> Needles:
        from zoo.tasks.kernels import stories

        c, n, first = self.config, len(keys), self.vocabulary.first
        low, high = self._facts
        sizes = low + random.below(random.fold(keys, 0), high - low + 1)
        facts, needed = np.zeros((n, high, 3), dtype=np.int64), np.zeros((n, high), dtype=np.bool_)
        asked, answers = np.zeros((n, 2), dtype=np.int64), np.zeros((n, 1 + c.things), dtype=np.int64)
        world = c.people, c.places, c.things
        told = stories.tell(random.fold(keys, 1), sizes, _MADE.index(c.question), *world, facts, needed, asked, answers)
        if not told:
            raise UsageError(
                f"babilong: hardly any story of {low} to {high} facts answers {c.question}: raise min_facts."
            )
        went = facts[:, :, 1] == stories.WENT
        facts += [first["people"], first["actions"], 0]
        facts[:, :, 2] += np.where(went, first["places"], first["things"])
        facts[np.arange(high) >= sizes[:, None]] = 0
        by_thing = c.question in ("qa2", "qa3")
        asked += [first["things" if by_thing else "people"], first["places"]]
        question = np.concatenate([np.full((n, 1), first["question"]), asked[:, : self.question_length - 1]], axis=1)
        return Needles(facts, needed, question, self._answer(answers))

    def _answer(self, answers: Tokens) -> Tokens:
        """(n, a) tokens of what the kernel answered."""
        first, said = self.vocabulary.first, answers[:, 1:]
        if self.config.question != "qa8":
            return said[:, :1] + first["counts" if self.config.question == "qa7" else "places"]
        place, held = np.arange(self.answer_length), np.maximum(answers[:, :1], 1)
        tokens = np.full((len(answers), self.answer_length), IGNORE)
        tokens[:, :-1] = np.where(answers[:, :1] == 0, first["nothing"], first["things"] + said)
        tokens[place == held] = first["end"]
        tokens[place > held] = IGNORE
        return tokens

    def _figures(self, batch: Batch, predictions: Tensor) -> Tensor:
        """(n,) whether the answer names the targets and nothing else."""
        end = self.vocabulary.first["end"]
        pairs = zip(*(a.tolist() for a in self.answers(batch, predictions)), strict=True)
        return torch.tensor([_labels(true, end) == _labels(said, end) for true, said in pairs]).double()


def _labels(answer: list[int], end: int) -> set[int]:
    """The tokens before the end of an answer."""
    stops = [i for i, token in enumerate(answer) if token in (end, IGNORE)]
    return set(answer[: stops[0]] if stops else answer)


def _named(names: list[str], name: str, count: int) -> list[str]:
    return [*names, *(f"{name}{i}" for i in range(len(names), count))][:count]
