"""Questions about long texts in the public forms of RULER and BABILong: read strictly and scored as published."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.readers import at_line, parse_json, read_text, regular, unreadable
from zoo.tasks import strings
from zoo.tasks.documents import read_library
from zoo.tasks.filing import Shelves, read_table
from zoo.tasks.protocol import IGNORE, Batch, Split

_SHOWN = 600  # characters of a prompt's beginning and of its end
_COLUMNS = {"input": ("input", "context", "story"), "question": ("question",), "target": ("target", "answer")}
_BETWEEN = re.compile(r"[\s,]*")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_TURNS = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), ("no", "yes")),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": _TURNS,
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""The words that answers to each of BABILong's questions are made of (`babilong/metrics.py`)."""


class Question(NamedTuple):
    """A question of a file.

    Attributes:
        line: where it begins.
        prompt: all that is given.
        question: the text of the question, if the file has one.
        references: what the answer should contain.
        depth: the share of the prompt's characters before the first reference, 0 where it holds none.
    """

    line: int
    prompt: str
    question: str
    references: tuple[str, ...]
    depth: float


def contained(answer: str, references: tuple[str, ...]) -> float:
    """The share of references that are in an answer, in whatever case (RULER's `string_match_all`)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def contained_any(answer: str, references: tuple[str, ...]) -> float:
    """1 if any reference is in an answer, in whatever case (RULER's `string_match_part`), else 0."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def names_labels(answer: str, target: str, question: str, labels: tuple[str, ...]) -> bool:
    """Whether the first sentence of an answer names the target's labels and no other (BABILong's `compare_answers`).

    Labels that the question names count as not said.
    """
    sentence = answer.lower().split(".")[0]
    for end in ("<context>", "<example>"):
        sentence = sentence.split(end)[0]
    return _targets(target) == {label for label in labels if label in sentence and label not in question.lower()}


def read_questions(path: str, text: str, kind: str | None) -> list[Question]:
    """The questions of a file: one JSON object a line, or a JSON array of them; of BABILong also a table (CSV), or
    stories as bAbI has them, in numbered lines.

    Args:
        path: the file.
        text: of the file.
        kind: which of BABILong's questions it asks; None for RULER's form.

    Raises:
        UsageError: the file holds no question, or something is not as it should be, with its line.
    """
    questions = []
    for line, record in _records(path, text, kind):
        if not isinstance(record, dict):
            raise at_line(path, line, f"a JSON object should be here, not {str(record)[:20]!r}")
        questions.append(_ruler(path, line, record) if kind is None else _babilong(path, line, record, kind))
    if not questions:
        raise UsageError(f"{path} holds no question.")
    return questions


def _records(path: str, text: str, kind: str | None) -> Iterator[tuple[int, Any]]:
    """What a file holds, with the lines where it begins."""
    first = text.lstrip()[:1]
    if first not in ("[", "{", ""):
        yield from _others(path, text, kind)
        return
    if first != "[":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, parse_json(path, line, number)
        return
    parse_json(path, text)  # tells of all faults of form
    at, seen, number = text.index("[") + 1, 0, 1
    while text[at := _BETWEEN.match(text, at).end()] != "]":  # type: ignore[union-attr]
        number += text.count("\n", seen, at)
        seen = at
        record, at = json.JSONDecoder().raw_decode(text, at)
        yield number, record


def _others(path: str, text: str, kind: str | None) -> Iterator[tuple[int, Any]]:
    """The records of a file that is no JSON, in forms that BABILong's questions also come in."""
    if kind is not None and re.match(r"\s*1 ", text):
        yield from _stories(path, text)
    elif kind is not None and (table := read_table(path, text, _COLUMNS)) is not None:
        yield from table
    else:
        more = "" if kind is None else ", a table (CSV) with these columns, and bAbI's numbered lines"
        keys = "input and outputs" if kind is None else "input, question and target"
        told = f"read are JSON objects with {keys}, one a line or in one array{more}"
        raise at_line(path, 1 + text.count("\n", 0, len(text) - len(text.lstrip())), f"this is no JSON; {told}")


def _stories(path: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The questions of bAbI's files: `1 Mary went to the hall.`, and `3 Where is Mary? <tab> hall <tab> 1`."""
    facts: list[str] = []
    for number, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        place, _, line = raw.strip().partition(" ")
        if not place.isdecimal():
            raise at_line(path, number, "the number of the line is missing, as in '1 Mary went to the hallway.'")
        if int(place[:9]) == 1:
            facts = []
        if "\t" not in line:
            facts.append(line.strip())
            continue
        question, target = (part.strip() for part in line.split("\t")[:2])
        yield number, {"input": " ".join(facts), "question": question, "target": target}


def _ruler(path: str, line: int, record: dict[str, Any]) -> Question:
    prompt = _text(path, line, record, "input")
    if record.get("answer_prefix", ""):
        prompt += _text(path, line, record, "answer_prefix")
    outputs = record.get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise at_line(path, line, "'outputs' should be a list of texts")
    references = tuple(_text(path, line, {"outputs": output}, "outputs") for output in outputs)
    first = min(prompt.find(reference) for reference in references)
    return Question(line, prompt, "", references, max(first, 0) / len(prompt))


def _babilong(path: str, line: int, record: dict[str, Any], kind: str) -> Question:
    context, question, target = (_text(path, line, record, key) for key in ("input", "question", "target"))
    if not _targets(target) <= set(LABELS[kind]):
        raise at_line(
            path, line, f"the target {target[:20]!r} is no answer to {kind}, which are {', '.join(LABELS[kind])}"
        )
    prompt = f"<context>\n{context.strip()}\n</context>\n\nQuestion: {question.strip()}\nAnswer:"
    return Question(line, prompt, question, (target,), 0.0)


def _targets(target: str) -> set[str]:
    """The labels of a target; those of directions are of three characters with a comma."""
    return set(target.lower().split(",")) if len(target) > 3 else {target.lower()}


def _text(path: str, line: int, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        told = f"not {str(value)[:20]!r}" if key in record else "and is missing"
        raise at_line(path, line, f"{key!r} should be a text, {told}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise at_line(path, line, f"{key!r} holds half a character") from None
    return value


class Writing(Protocol):
    """How text becomes tokens."""

    end: int
    """The token behind an answer, and of padding."""
    vocab_size: int

    def prompt(self, text: str) -> list[int]: ...

    def answer(self, text: str) -> list[int]: ...

    def text(self, tokens: list[int]) -> str: ...


class Bytes:
    """Bytes, and 256 before the first and behind the last."""

    end = 256
    vocab_size = 257

    def prompt(self, text: str) -> list[int]:
        return [self.end, *text.encode()]

    def answer(self, text: str) -> list[int]:
        return list(text.encode())

    def text(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if 0 <= t < 256).decode("utf-8", "replace")


class Subwords:
    """The tokens of a tokenizer's JSON file (of the library `tokenizers`)."""

    def __init__(self, task: str, path: str, end: str | None):
        """`end` is the token behind an answer; by default one more than the file has."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            told = 'pip install "sequence-zoo[text]", or leave tokenizer out for bytes'
            raise UsageError(f"{task}: tokenizer={path!r} needs the package tokenizers: {told}.") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(regular(path)))
        except UsageError:
            raise
        except Exception as error:  # whatever a damaged file raises
            raise unreadable(path, error) from None
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        if end is not None and end not in known:
            raise UsageError(f"{task}: end_token={end!r} is not in {path}.")
        size = 1 + max(known.values(), default=-1)
        self.end = size if end is None else known[end]
        self.vocab_size = size + (end is None)

    def prompt(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def answer(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode([t for t in tokens if 0 <= t != self.end], skip_special_tokens=True)


class QuestionRows:
    """The questions of a file as rows of tokens: the prompt, then the answer, which is scored, and an end."""

    def __init__(
        self,
        files: tuple[str, str | None],
        seq_len: int,
        writing: Writing,
        kind: str | None,
        write: Callable[[tuple[str, ...]], str],
        *,
        any_of: bool = False,
    ):
        """Args: file and test file, length of the rows, tokens, which of BABILong's questions, an answer's text, and
        whether one of several references is enough."""
        self._writing, self._seq_len, self._kind, self._any_of = writing, seq_len, kind, any_of
        paths = [path for path in files if path is not None]
        read = {path: self._encoded(path, self._questions(path), write) for path in dict.fromkeys(paths)}
        self._shelves = [read[path] for path in paths]
        main, *tested = (np.array([row.key for row in shelf], dtype=np.uint64) for shelf in self._shelves)
        self._split = Shelves(files[0], main, tested[0] if tested else None)
        self._by_key = {row.key: row.question for shelf in self._shelves for row in shelf}

    def _questions(self, path: str) -> list[Question]:
        text = read_text(path)
        library = read_library(path, text) if self._kind is None else None
        if library is None:
            return read_questions(path, text, self._kind)
        if not self._any_of:
            told = "whose answers are alternatives: set task=qa_1 or task=qa_2, or task.references=any"
            raise UsageError(f"{path} is a file of SQuAD or HotpotQA, {told}.")

        def count(text: str) -> int:
            return len(self._writing.prompt(text))

        sizes, found = library.sizes(count), []
        for number, asked in enumerate(library.questions):
            answer = len(self._writing.answer(f" {asked.references[0]}"))
            prompt, size = library.prompt(number, self._seq_len - answer, count, sizes)
            if size + answer > self._seq_len:
                told = f"{size + answer} tokens with its own documents alone, more than seq_len={self._seq_len}"
                raise UsageError(f"{path}: question {number + 1} has {told}.")
            first = min((at for r in asked.references if (at := prompt.find(r)) >= 0), default=0)
            found.append(Question(number + 1, prompt, asked.text, asked.references, first / len(prompt)))
        return found

    def _encoded(self, path: str, questions: list[Question], write: Callable[[tuple[str, ...]], str]) -> list[Row]:
        rows = []
        for question in questions:
            space = "" if question.prompt[-1].isspace() else " "
            prompt = self._writing.prompt(question.prompt)
            written = question.references[:1] if self._any_of else question.references
            answer = [*self._writing.answer(space + write(written)), self._writing.end]
            rows.append(Row(np.array(prompt + answer, dtype=np.int64), len(prompt), question))
        sizes = [len(row.tokens) - 1 for row in rows]
        for question, size in zip(questions, sizes, strict=True):
            if size > self._seq_len:
                told = f"{size} tokens are more than seq_len={self._seq_len}; the longest question has {max(sizes)}"
                raise at_line(path, question.line, told)
        return rows

    def sample(self, start: int, n: int, split: Split, seed: int, *, with_depth: bool) -> Batch:
        """Rows start ... start + n - 1 of a stream."""
        second, places = self._split.rows(start, n, split, seed)
        rows = [self._shelves[second][place] for place in places.tolist()]
        inputs = np.full((n, self._seq_len), self._writing.end)
        targets = np.full((n, self._seq_len), IGNORE)
        for i, row in enumerate(rows):
            size = len(row.tokens) - 1
            inputs[i, :size] = row.tokens[:-1]
            targets[i, row.asked - 1 : size] = row.tokens[row.asked :]
        slices = {"length": strings.length_bucket(np.array([len(row.tokens) - 1 for row in rows]))}
        if with_depth:
            slices["depth"] = np.array([min(9, int(10 * row.question.depth)) for row in rows])
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {k: torch.from_numpy(v) for k, v in slices.items()}
        )

    def figures(self, batch: Batch, predictions: Tensor) -> Tensor:
        """(n,) the share of references in each answer, or whether it names BABILong's labels."""
        found = []
        for inputs, targets, said in zip(batch.inputs, batch.targets, predictions, strict=True):
            scored = targets != IGNORE
            begin = int(scored.nonzero()[0]) + 1
            key = fingerprint([*inputs[:begin].tolist(), *targets[scored].tolist()])
            found.append(self._figure(self._by_key[key], self._said(said[scored])))
        return torch.tensor(found, dtype=torch.float64)

    def _figure(self, question: Question, answer: str) -> float:
        if self._kind is None:
            return (contained_any if self._any_of else contained)(answer, question.references)
        return float(names_labels(answer, question.references[0], question.question, LABELS[self._kind]))

    def _said(self, tokens: Tensor) -> str:
        """The text before the first end."""
        said = tokens.tolist()
        return self._writing.text(said[: said.index(self._writing.end)] if self._writing.end in said else said)

    def render(self, batch: Batch, row: int, predictions: Tensor | None) -> str:
        """A prompt, shortened in its middle, its answer and what was predicted."""
        scored = batch.targets[row] != IGNORE
        prompt = self._writing.text(batch.inputs[row, : int(scored.nonzero()[0]) + 1].tolist()).strip()
        if len(prompt) > 2 * _SHOWN:
            middle = f"[... {len(prompt) - 2 * _SHOWN:,} characters ...]"
            prompt = f"{prompt[:_SHOWN]}\n{middle}\n{prompt[-_SHOWN:]}"
        lines = [prompt, "", f"answer     {self._said(batch.targets[row][scored]).strip()}"]
        if predictions is not None:
            lines.append(f"predicted  {self._said(predictions[row][scored]).strip()}")
        return "\n".join(lines)


class Row:
    """Tokens of prompt and answer, how many are of the prompt, and the question."""

    def __init__(self, tokens: strings.Tokens, asked: int, question: Question):
        self.tokens, self.asked, self.question = tokens, asked, question
        self.key = fingerprint(tokens.tolist())


def fingerprint(tokens: list[int]) -> int:
    """One number for a list of tokens."""
    return int.from_bytes(hashlib.blake2b(np.array(tokens, dtype="<i8").tobytes(), digest_size=8).digest(), "little")
