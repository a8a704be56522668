"""Long rows with a question at the end: where needles lie in them, how they are cut, scored and drawn."""

from __future__ import annotations

import textwrap
from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request
from zoo.tasks.question_files import Bytes, QuestionRows, Subwords

Tokens = NDArray[np.int64]
Depth = float | tuple[float, float] | None

PAD = 0
_SHOWN = 1200  # tokens of a context that are drawn


class LongOptions(Options):
    """Options of every task with a long context."""

    seq_len: PositiveInt = 256
    """Length L of the rows, of any size."""
    min_length: PositiveInt | None = None
    """Shortest row: lengths are uniform from here to seq_len. By default all rows are of seq_len."""


class QuestionOptions(LongOptions):
    """Options of a task that may also be read from files in a public form."""

    path: str | None = None
    """A file of questions to use instead of the generator, each a row of text."""
    test_path: str | None = None
    """A file whose questions are all the test split. The same questions of `path` are in no split."""
    tokenizer: str | None = None
    """A tokenizer's JSON file (of the library `tokenizers`) for files of text; by default bytes."""
    end_token: str | None = None
    """The token after an answer; by default one beyond those of the tokenizer."""
    references: Literal["all", "any"] | None = None
    """Of a file in RULER's form, whether an answer should contain all references (the default) or any, as in RULER's
    qa. With "any", files of SQuAD and HotpotQA are read too, as RULER's qa_1 and qa_2 ask them."""


_OF_FILES = ("seq_len", "path", "test_path", "tokenizer", "end_token", "references")


class Vocabulary:
    """Token ids in ranges: 0 is padding, then each range in the order given."""

    def __init__(self, **ranges: int | Sequence[str]):
        """Ranges by name: words, or how many tokens, which are then called by the first letter of the range."""
        self._names = ["."]
        self.first: dict[str, int] = {}
        for name, words in ranges.items():
            self.first[name] = len(self._names)
            self._names += [f"{name[0]}{i}" for i in range(words)] if isinstance(words, int) else words

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, token: int) -> str:
        return self._names[token] if 0 <= token < len(self._names) else "?"


class Rows(NamedTuple):
    """n rows before they are put together.

    Attributes:
        context: (n, H) what is read, padded at the end.
        question: (n, q).
        answer: (n, a), `IGNORE` behind the end of shorter ones.
        slices: as of a batch.
    """

    context: Tokens
    question: Tokens
    answer: Tokens
    slices: dict[str, Tokens]


class LongContext(Task):
    """A context, a question and an answer that is written token by token.

    A row of length l is l - q - a + 1 tokens of context, q of question and the answer but for its last token, which is
    only predicted; behind it is padding. `order` may mix question and answer.
    """

    layout = "next_token"
    continues = True
    config: QuestionOptions
    vocabulary: Vocabulary
    question_length: int
    answer_length: int
    reference_length = 1
    """Tokens of one reference of an answer."""
    has_depth = False
    """Whether the first reference of a file's question shows the depth of its needle."""
    figure = "contained"
    """The published figure."""

    def __init__(self, config: QuestionOptions):
        super().__init__(config)
        self.seq_len = config.seq_len
        self._file: QuestionRows | None = None
        if config.path is not None:
            self._open(config.path)
            return
        for option in ("test_path", "tokenizer", "end_token", "references"):
            if getattr(config, option) is not None:
                raise UsageError(f"{self.name}: {option} goes with path, a file of questions.")
        self._shortest = config.min_length or config.seq_len
        if self._shortest > config.seq_len:
            raise UsageError(f"{self.name}: min_length={config.min_length} is more than seq_len={config.seq_len}.")
        self._prepare()
        self.order = self._order()
        self.vocab_size = len(self.vocabulary)

    def _open(self, path: str) -> None:
        """Take the rows from a file, or two."""
        c = self.config
        steering = [name for name in c.changed() if name not in (*_OF_FILES, self._file_kind and "question")]
        if steering:
            raise UsageError(f"{self.name}: {steering[0]} steers the generator and cannot go with path={path!r}.")
        if c.references is not None and self._file_kind is not None:
            raise UsageError(f"{self.name}: references={c.references!r} is of files in RULER's form: leave it out.")
        if c.end_token is not None and c.tokenizer is None:
            raise UsageError(f"{self.name}: end_token={c.end_token!r} goes with tokenizer.")
        writing = Bytes() if c.tokenizer is None else Subwords(self.name, c.tokenizer, c.end_token)
        files, any_of = (path, c.test_path), c.references == "any"
        self._file = QuestionRows(files, c.seq_len, writing, self._file_kind, self.written, any_of=any_of)
        self.vocab_size = writing.vocab_size

    @property
    def _file_kind(self) -> str | None:
        """Which of BABILong's questions a file asks; None for RULER's form."""
        return None

    @staticmethod
    def written(references: tuple[str, ...]) -> str:
        """The answer that a file's references make."""
        return ", ".join(references)

    @abstractmethod
    def _prepare(self) -> None:
        """Check the options, set `vocabulary`, `question_length` and `answer_length`."""

    def _order(self) -> Tokens:
        """The places of question and answer, one behind the other, in the order in which they are written."""
        return np.arange(self.question_length + self.answer_length)

    @abstractmethod
    def _plan(self, keys: random.Keys, room: Tokens) -> Tokens:
        """(n, W) what decides rows with so many tokens of context (n,), from keys (n,).

        What can be read off the row: rows with different plans are different, so splits are of plans.
        """

    @abstractmethod
    def _rows(self, keys: random.Keys, room: Tokens, plan: Tokens) -> Rows:
        """Rows from their plans (n, W); keys (n,) are for the rest."""

    def require_room(self, least: int, what: str) -> None:
        """Raises UsageError where the shortest row has less than `least` tokens of context."""
        around = self.question_length + self.answer_length - 1
        if self._shortest - around < least:
            option = "seq_len" if self.config.min_length is None else "min_length"
            raise UsageError(
                f"{self.name}: {option}={self._shortest} is too short for {what}: take at least {least + around}."
            )

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        if self._file is not None:
            return self._file.sample(start, n, split, seed, with_depth=self.has_depth)
        keys = random.row_keys(split, seed, start, n)
        around = self.question_length + self.answer_length - 1

        def draw(keys: random.Keys) -> Tokens:
            lengths = self._shortest + random.below(random.fold(keys, 0), self.seq_len - self._shortest + 1)
            return np.concatenate([lengths[:, None], self._plan(random.fold(keys, 1), lengths - around)], axis=1)

        plan = strings.draw_for_split(random.fold(keys, 0), split, draw)
        lengths = plan[:, 0]
        room = lengths - around
        rows = self._rows(random.fold(keys, 1), room, plan[:, 1:])
        inputs = np.zeros((n, self.seq_len + 1), dtype=np.int64)  # one more than is read
        inputs[:, : rows.context.shape[1]] = rows.context
        tail = np.concatenate([rows.question, rows.answer], axis=1)[:, self.order]
        place = room[:, None] + np.arange(tail.shape[1])
        follows = np.pad(tail[:, 1:] != IGNORE, ((0, 0), (0, 1)))  # the last token of an answer is not read back
        np.put_along_axis(inputs, place, np.where(follows, tail, PAD), axis=1)
        targets = np.full((n, self.seq_len), IGNORE)
        np.put_along_axis(targets, place - 1, np.where(self.order < self.question_length, IGNORE, tail), axis=1)
        told = lengths if self._shortest == self.seq_len else strings.length_bucket(lengths)
        slices = {**rows.slices, "length": told}
        return Batch(
            torch.from_numpy(inputs[:, :-1]),
            torch.from_numpy(targets),
            {name: torch.from_numpy(values) for name, values in slices.items()},
        )

    def answers(self, batch: Batch, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """(n, a) the answers, `IGNORE` behind the end of shorter ones, and what was predicted in their places."""
        places = (batch.targets != IGNORE).long().cumsum(1) - 1
        rows, at = (batch.targets != IGNORE).nonzero(as_tuple=True)
        true = torch.full((len(batch.targets), self.answer_length), IGNORE)
        said = true.clone()
        true[rows, places[rows, at]] = batch.targets[rows, at]
        said[rows, places[rows, at]] = predictions[rows, at]
        return true, said

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """The published figure."""
        if self._file is not None:
            return {self.figure: self._file.figures(batch, predictions)}
        return {self.figure: self._figures(batch, predictions)}

    def _figures(self, batch: Batch, predictions: Tensor) -> Tensor:
        """(n,) the share of references that are somewhere in the answer."""
        true, said = (a.unflatten(1, (-1, self.reference_length)) for a in self.answers(batch, predictions))
        found = (true[:, :, None] == said[:, None]).all(3).any(2)
        return found.double().mean(1)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        if self._file is not None:
            return self._file.render(batch, row, predictions)
        scored = (batch.targets[row] != IGNORE).nonzero()[:, 0]
        asked = self.order < self.question_length
        begin = int(scored[0]) + 1 - int(np.argmin(asked))
        lines = {
            "context": self._drawn(batch.inputs[row, :begin].tolist()),
            "question": self._words(batch.inputs[row, begin + np.flatnonzero(asked)]),
            "answer": self._words(batch.targets[row, scored]),
        }
        if predictions is not None:
            said, true = predictions[row, scored], batch.targets[row, scored]
            marks = zip(said.tolist(), true.tolist(), strict=True)
            lines["predicted"] = " ".join(self.vocabulary[s] + "!" * (s != t) for s, t in marks)
        return "\n".join(
            textwrap.fill(f"{name:<10}{text}", 100, subsequent_indent=" " * 10) for name, text in lines.items()
        )

    def _words(self, tokens: Tensor) -> str:
        return " ".join(self.vocabulary[t] for t in tokens.tolist())

    def _drawn(self, tokens: list[int]) -> str:
        """A context as words, the rest of a long one as its length."""
        left = len(tokens) - _SHOWN
        words = [self.vocabulary[t] for t in tokens[:_SHOWN]]
        return " ".join([*words, f"... ({left:,} more)"] if left > 0 else words)


class HaystackOptions(QuestionOptions):
    """Options of a task with needles in a haystack."""

    depth: Depth = None
    """Place of the needles with the answer, from 0 (the start) to 1 (the question): a number, a range, or anywhere."""
    haystack: Literal["random", "repeated"] = "random"
    """The tokens between the needles: random filler tokens, or all filler tokens in a cycle."""
    filler_vocab: PositiveInt = 16
    """Number of filler tokens."""

    @field_validator("depth", mode="before")
    @classmethod
    def _as_share(cls, value: Any) -> Any:
        ends = tuple(value) if isinstance(value, list | tuple) else (value, value)
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
        if value is None or (numbers and len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1):
            return tuple(value) if isinstance(value, list) else value
        raise UsageError(f"depth={value!r} is not allowed: it should be a number from 0 to 1, or two, the least first.")


class Needles(NamedTuple):
    """What is hidden in n rows.

    Attributes:
        tokens: (n, m, b) m needles of b tokens; of zeros where a row has fewer needles.
        needed: (n, m) which of them the answer needs.
        question: (n, q).
        answer: (n, a), for each row in the order in which the needles come.
    """

    tokens: Tokens
    needed: NDArray[np.bool_]
    question: Tokens
    answer: Tokens


class Haystack(LongContext):
    """Needles in a haystack. Needles of one chain come in order; which those are, `chains` (m,) says.

    Slices: `depth`, the tenth of the haystack, from 0 to 9, in which the first needed needle lies, and `length`.
    """

    config: HaystackOptions
    needle_length: int
    chains: Tokens
    steered: NDArray[np.bool_]
    """(m,) which needles lie where `depth` says; the others lie anywhere."""
    unit = 1
    """Tokens of the haystack between which no needle is put."""

    @abstractmethod
    def _needles(self, keys: random.Keys) -> Needles:
        """Needles of each row, in the order of `chains`, from keys (n,)."""

    def require_instances(self, contents: float, what: str) -> None:
        """Raises UsageError if this number of needles and questions, with their places, makes too few rows."""
        depth, least = self.config.depth, self._shortest - self.question_length - self.answer_length + 1
        places = (least - self.needle_length * len(self.chains)) // self.unit
        spread = depth[1] - depth[0] if isinstance(depth, tuple) else depth is None
        strings.check_instances(self.name, contents * (1 + spread * places), what)

    def _plan(self, keys: random.Keys, room: Tokens) -> Tokens:
        needles = self._needles(random.fold(keys, 0))
        n, m, b = needles.tokens.shape
        present = needles.tokens[:, :, 0] != PAD
        places = self._fillers(room, present) + 1
        at = self._places(random.fold(keys, 1), places, present)
        order = np.argsort(at, axis=1, kind="stable")
        slots = np.take_along_axis(np.where(present, at, 0).astype(np.int64), order, axis=1)
        tokens = np.take_along_axis(needles.tokens, order[:, :, None], axis=1)
        first = np.where(needles.needed, at, np.inf).min(1).astype(np.int64)
        depth = np.minimum(first * 10 // np.maximum(places - 1, 1), 9)
        return np.concatenate([depth[:, None], slots, tokens.reshape(n, m * b), needles.question, needles.answer], 1)

    def _fillers(self, room: Tokens, present: NDArray[np.bool_]) -> Tokens:
        """(n,) units of the haystack."""
        return (room - self.needle_length * present.sum(1)) // self.unit

    def _places(self, keys: random.Keys, places: Tokens, present: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(n, m) how many units of the haystack come before each needle, and a fraction to order those of one place."""
        depth = self.config.depth
        least, most = depth if isinstance(depth, tuple) else (0.0, 1.0) if depth is None else (depth, depth)
        last = places[:, None] - 1
        low = np.where(self.steered, np.rint(least * last), 0)
        high = np.where(self.steered, np.rint(most * last), last)
        at = low + random.uniform(random.bits(keys, present.shape[1])) * (high + 1 - low)
        at[~present] = np.inf
        for chain in np.unique(self.chains):
            members = self.chains == chain
            at[:, members] = np.sort(at[:, members], axis=1)
        return at

    def _rows(self, keys: random.Keys, room: Tokens, plan: Tokens) -> Rows:
        n, m, b = len(plan), len(self.chains), self.needle_length
        ends = np.cumsum([1, m, m * b, self.question_length])
        depth, slots, flat, question, answer = np.split(plan, ends, axis=1)
        tokens = flat.reshape(n, m, b)
        present = tokens[:, :, 0] != PAD
        rest = (room - b * present.sum(1)) % self.unit  # filler too short for a unit opens the row
        starts = rest[:, None] + slots * self.unit + b * np.arange(m)
        places = starts[:, :, None] + np.arange(b)
        row = np.broadcast_to(np.arange(n)[:, None, None], places.shape)[present]
        context = np.zeros((n, int(room.max())), dtype=np.int64)
        context[row, places[present]] = tokens[present]
        self._fill(context, keys, rest, question)
        context[np.arange(context.shape[1]) >= room[:, None]] = PAD
        return Rows(context, question, answer, {"depth": depth[:, 0]})

    def _fill(self, context: Tokens, keys: random.Keys, rest: Tokens, question: Tokens) -> None:
        """Put the haystack where the context (n, H) is empty."""
        filler, first = self.config.filler_vocab, self.vocabulary.first["filler"]
        if self.config.haystack == "random":
            stream = random.below(random.bits(keys, context.shape[1]), filler)
        else:
            begin = random.below(random.fold(keys, 0), filler)
            stream = (begin[:, None] + np.cumsum(context == PAD, axis=1)) % filler
        np.copyto(context, first + stream, where=context == PAD)

    def _drawn(self, tokens: list[int]) -> str:
        """A context as words, stretches of filler as their lengths."""
        first = self.vocabulary.first["filler"]
        words = []
        for is_filler, run in groupby(tokens, lambda t: first <= t < first + self.config.filler_vocab):
            stretch = list(run)
            long = is_filler and len(stretch) > 3
            words += [f"~{len(stretch):,}~"] if long else [self.vocabulary[t] for t in stretch]
        left = len(words) - _SHOWN
        return " ".join([*words[:_SHOWN], f"... ({left:,} more)"] if left > 0 else words)
