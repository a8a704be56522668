"""Problems of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760) as texts, with the scorers of that library."""

from __future__ import annotations

import importlib.util
import random as python_random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, SPLITS, Batch, Split, Task, check_request, register

_END = 256
_NUMBERS = 2**31 - 1  # of problems
_MOST_DRAWS = 2000  # of a row
_MOST_KEPT = 200_000  # problems of which the answers can be scored
_MIXTURE = "composite"  # of other data sets

# Scorers of some data sets evaluate an answer as Python. What a model wrote is not evaluated unless it is arithmetic, a
# list or a formula: no attribute, no call but of these functions, and no power that takes for ever.
_EVALUATED = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
_FUNCTIONS = frozenset(("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt"))
_FORMULA = re.compile(r"[\w\s+\-*/^(),.\[\]'\"]*", re.ASCII)
_REFUSED = re.compile(r"__|\.\s*[A-Za-z_]|\)\s*\(|\]\s*\(|['\"]\s*\(|\*\*\s*[(\-]*\s*\d{3}|\*\*[^+,]*\*\*|\d{40}")


@register("reasoning_gym")
class ReasoningGym(Task):
    """Answer a problem of reasoning-gym, a text of bytes after a text of bytes.

    With dataset="chain_sum", the end of a row as a person sees it and as tokens (256 is behind the question and behind
    the answer, `.` is `IGNORE`):

        ```
                       4  +  3  =  |  7
        inputs    ... 52 43 51 61 256 55
        targets   ...  .  .  .  .  55 256
        ```

    A row depends on its number alone. Problems of which question and answer take more than `seq_len` bytes are drawn
    again, and so are those whose own answer is missing or which the library's scorer does not accept. A question is in
    one split.

    Many answers may be right: `exact` is the share of answers that the library's scorer accepts (1), and `reward` its
    mean, from 0 to 1, where some scorers give a part to an answer that is nearly right. Both are for models that read
    their own answers (`objective.free_running=true`). `accuracy` is the share of right bytes behind the true ones.
    An answer has as many bytes as the target at most.

    Scorers of nine data sets, such as `countdown`, evaluate an answer as Python. There an answer that is no plain
    arithmetic, list or formula counts as wrong, and is not evaluated.
    """

    class Config(Options):
        """Options of `reasoning_gym`."""

        dataset: str = "chain_sum"
        """Name of a data set of the library, such as `knights_knaves`; `settings` are its options."""
        settings: dict[str, Any] = Field(default_factory=dict)
        """Options of the data set by the library's names, such as `{min_terms: 2, max_terms: 3}`."""
        seq_len: Annotated[int, Field(ge=8)] = 256
        """Length of the rows: most bytes of a question with its answer, and one."""

    layout = "next_token"
    continues = True
    many_answers = "the library's own answers"
    overlap = "Data sets of few problems repeat them. No question is in two splits."
    vocab_size = 257
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if importlib.util.find_spec("reasoning_gym") is None:
            told = 'which is missing: pip install "sequence-zoo[reasoning]"'
            raise UsageError(f"reasoning_gym reads the package reasoning-gym, {told}.")
        self.seq_len = config.seq_len
        self._made: Any = None
        self._numbers: dict[bytes, int] = {}  # of problems, by their questions

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    @property
    def dataset(self) -> Any:
        """The library's data set, made on first use."""
        if self._made is None:
            from reasoning_gym.factory import DATASETS, create_dataset

            c = self.config
            known = sorted(set(DATASETS) - {_MIXTURE})
            if c.dataset not in known:
                raise unknown("data set of reasoning-gym", c.dataset, known)
            if taken := {"seed", "size"} & set(c.settings):
                raise UsageError(
                    f"reasoning_gym: settings may not have {taken.pop()!r}: rows have numbers of their own."
                )
            try:
                self._made = create_dataset(c.dataset, seed=0, **c.settings)
            except Exception as error:  # whatever its own checks raise
                told = " ".join(str(error).split()) or type(error).__name__
                raise UsageError(f"reasoning_gym: {c.dataset} refuses settings={c.settings}: {told:.200}.") from None
        return self._made

    def _problem(self, number: int) -> dict[str, Any]:
        """A problem of the library. Those of a data set that makes a list of all come again behind its end."""
        with _seeded(number):
            try:
                return self.dataset[number]
            except IndexError:
                return self.dataset[number % len(self.dataset)]

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        inputs, targets = np.zeros((n, self.seq_len), dtype=np.int64), np.full((n, self.seq_len), IGNORE)
        sizes = np.zeros(n, dtype=np.int64)
        for row, key in enumerate(random.row_keys(split, seed, start, n)):
            question, answer = self._drawn(key, split)
            text = [*question, _END, *answer, _END]
            sizes[row] = len(text) - 1
            inputs[row, : sizes[row]] = text[:-1]
            targets[row, len(question) : sizes[row]] = text[len(question) + 1 :]
        slices = {"length": torch.from_numpy(strings.length_bucket(sizes))}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)

    def _drawn(self, key: np.uint64, split: Split) -> tuple[bytes, bytes]:
        """Question and answer of a row."""
        numbers = random.below(random.bits(np.array([key]), _MOST_DRAWS)[0], _NUMBERS)
        shortest = None
        for number in numbers.tolist():
            problem = self._problem(number)
            question, answer = problem["question"].encode(), problem["answer"]
            if random.split_of(random.contents([np.frombuffer(question, np.uint8)]))[0] != SPLITS.index(split):
                continue
            if not isinstance(answer, str) or not answer or self._reward(answer, problem) < 1:
                continue
            size = len(question) + 1 + len(answer.encode())
            if size > self.seq_len:
                shortest = min(size, shortest or size)
                if number == numbers[200]:
                    break
                continue
            if len(self._numbers) >= _MOST_KEPT:
                self._numbers.pop(next(iter(self._numbers)))
            self._numbers[question] = number
            return question, answer.encode()
        told = f"reasoning_gym: no problem of {self.config.dataset!r} was found for the split {split!r}"
        why = (
            "none has an answer that its scorer accepts" if shortest is None else f"the shortest took {shortest} bytes"
        )
        raise UsageError(f"{told} within seq_len={self.seq_len}: of those drawn, {why}.")

    def _reward(self, answer: str, problem: dict[str, Any]) -> float:
        """What the library's scorer gives an answer, 0 where it fails."""
        if self.config.dataset in _EVALUATED and not _is_harmless(answer):
            return 0.0
        try:
            with _seeded(0):
                return float(self.dataset.score_answer(answer, problem))
        except Exception:  # of an answer in no form that it expects
            return 0.0

    def _rewards(self, batch: Batch, answers: Tensor) -> Tensor:
        """(n,) what the scorer gives each answer."""
        found = []
        rows = zip(batch.inputs.tolist(), batch.scored.tolist(), answers.tolist(), strict=True)
        for inputs, scored, said in rows:
            question = bytes(inputs[: inputs.index(_END)])
            if question not in self._numbers:
                raise UsageError("reasoning_gym: rows are scored by the task that drew them; draw them again.")
            text = [token for token, kept in zip(said, scored, strict=True) if kept]
            text = text[: text.index(_END)] if _END in text else text
            if not text or not all(0 <= token < _END for token in text):
                found.append(0.0)
                continue
            found.append(self._reward(bytes(text).decode("utf-8", "replace"), self._problem(self._numbers[question])))
        return torch.tensor(found, dtype=torch.float64)

    def is_right(self, batch: Batch, answers: Tensor) -> Tensor:
        return (self._rewards(batch, answers) >= 1).to(answers.device)

    def right_cells(self, batch: Batch, answers: Tensor) -> Tensor:
        return (answers == batch.targets) | self.is_right(batch, answers)[:, None]

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`reward`: what the library's scorer gives, from 0 to 1."""
        return {"reward": self._rewards(batch, predictions)}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        inputs, scored = batch.inputs[row].tolist(), batch.scored[row]
        lines = [bytes(inputs[: inputs.index(_END)]).decode("utf-8", "replace")]
        lines += ["", f"answer     {_text(batch.targets[row][scored])}"]
        if predictions is not None:
            lines.append(f"predicted  {_text(predictions[row][scored])}")
        return "\n".join(lines)

    def spell(self, token: int) -> str:
        return "|" if token == _END else _text(torch.tensor([token]))


def _text(tokens: Tensor) -> str:
    """The bytes before the first end."""
    said = tokens.tolist()
    said = said[: said.index(_END)] if _END in said else said
    text = bytes(token if 0 <= token < _END else 63 for token in said).decode("utf-8", "replace")
    return text if text.isprintable() else repr(text)[1:-1]


def _is_harmless(answer: str) -> bool:
    """Whether an answer that a scorer evaluates is arithmetic, a list or a formula."""
    called = set(re.findall(r"([A-Za-z_]\w*)\s*\(", answer))
    return bool(_FORMULA.fullmatch(answer)) and not _REFUSED.search(answer) and called <= _FUNCTIONS


@contextmanager
def _seeded(number: int) -> Iterator[None]:
    """Python's own random state, which some data sets use, as it follows from a number; put back at the end."""
    state = python_random.getstate()
    python_random.seed(number)
    try:
        yield
    finally:
        python_random.setstate(state)
