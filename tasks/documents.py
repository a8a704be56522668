"""Questions about documents in SQuAD's and HotpotQA's own files, in the prompts of RULER's qa_1 and qa_2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from zoo.core.errors import UsageError
from zoo.core.readers import parse_json, unreadable
from zoo.tasks import random

MOST = 500
"""Questions that are taken from a file, the first ones: as many as RULER's runs have."""
_TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_BEFORE = f"{_TASK}\n\nThe following are given documents.\n\n"
_BEHIND = f"\n\n{_TASK}\n\nQuestion: {{}} Answer:"


class Asked(NamedTuple):
    """A question about documents.

    Attributes:
        text: the question.
        references: answers, of which one is enough.
        own: the documents, by number, that the answer is in.
        near: further documents of the same source.
    """

    text: str
    references: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...]


class Library(NamedTuple):
    """The documents and questions of a file."""

    documents: list[str]
    questions: list[Asked]

    def sizes(self, count: Callable[[str], int]) -> list[int]:
        """Tokens of each document in a prompt, about."""
        return [count(f"Document 999:\n{document}\n\n") for document in self.documents]

    def prompt(self, number: int, room: int, count: Callable[[str], int], sizes: list[int]) -> tuple[str, int]:
        """The prompt of a question, and its tokens: its own documents and as many others as there is room for, in
        random order.

        The others are those of the same source first, then any. What is drawn depends on the number of the question.

        Args:
            number: of the question.
            room: tokens of the prompt; more only if its own documents have more.
            count: how many tokens a text has.
            sizes: of the documents.
        """
        asked, key = self.questions[number], np.array([number], dtype=np.uint64)
        chosen = list(asked.own)
        left = room - count(_BEFORE + _BEHIND.format(asked.text)) - sum(sizes[i] for i in chosen)
        near: list[int] = []
        if asked.near:
            near = [asked.near[k] for k in random.fold(key, np.array(asked.near, dtype=np.uint64)).argsort()]
        draws = 16 + 2 * len(sizes) * room // sum(sizes)
        others = random.below(random.bits(key, draws)[0], len(sizes)).tolist()
        for i in [*near, *others]:
            if i not in chosen and sizes[i] <= left:
                chosen.append(i)
                left -= sizes[i]
        while True:
            order = np.array(chosen)[random.fold(key, np.array(chosen, dtype=np.uint64)).argsort()]
            texts = [f"Document {place}:\n{self.documents[i]}" for place, i in enumerate(order.tolist(), 1)]
            prompt = _BEFORE + "\n\n".join(texts) + _BEHIND.format(asked.text)
            if (n := count(prompt)) <= room or len(chosen) == len(asked.own):
                return prompt, n
            chosen.pop()


def read_library(path: str, text: str) -> Library | None:
    """The documents and questions of a file in SQuAD's form or in HotpotQA's; None where it has neither.

    Raises:
        UsageError: a part that is not as it should be, with its place.
    """
    if text.lstrip()[:1] == "{" and '"paragraphs"' in text:
        try:
            whole = parse_json(path, text)
        except UsageError:  # lines of JSON, or damaged
            return None
        return _squad(path, whole) if isinstance(whole, dict) and "data" in whole else None
    if text.lstrip()[:1] == "[" and '"supporting_facts"' in text:
        return _hotpot(path, parse_json(path, text))
    return None


def _squad(path: str, whole: dict[str, Any]) -> Library:
    """`data` of articles with `paragraphs`, each a `context` with questions `qas`; those without an answer are left
    out."""
    number: dict[str, int] = {}
    found = []
    for i, article in enumerate(_list(path, "data", whole.get("data"))):
        where = f"data[{i}]"
        paragraphs = _list(path, f"{where}.paragraphs", _of(path, where, article).get("paragraphs"))
        contexts = [
            _text(path, f"{where}.paragraphs[{k}].context", _of(path, where, p).get("context"))
            for k, p in enumerate(paragraphs)
        ]
        places = [number.setdefault(context, len(number)) for context in contexts]
        for k, paragraph in enumerate(paragraphs):
            here = f"{where}.paragraphs[{k}].qas"
            for j, asked in enumerate(_list(path, here, paragraph.get("qas"))):
                at = f"{here}[{j}]"
                if _of(path, at, asked).get("is_impossible"):
                    continue
                answers = _list(path, f"{at}.answers", asked.get("answers"))
                told = [_text(path, f"{at}.answers", _of(path, at, answer).get("text")) for answer in answers]
                if not told:
                    raise unreadable(path, f"{at}.answers holds no answer")
                near = tuple(p for p in places if p != places[k])
                question = _text(path, f"{at}.question", asked.get("question"))
                found.append(Asked(question, tuple(dict.fromkeys(told)), (places[k],), near))
    return _library(path, number, found)


def _hotpot(path: str, whole: Any) -> Library:
    """Objects with `question`, `answer` and `context`, a list of [title, sentences]; the answer is in all of them."""
    number: dict[str, int] = {}
    found = []
    for i, asked in enumerate(_list(path, "the file", whole)):
        places = []
        for k, document in enumerate(_list(path, f"[{i}].context", _of(path, f"[{i}]", asked).get("context"))):
            at = f"[{i}].context[{k}]"
            if not isinstance(document, list) or len(document) != 2:
                raise unreadable(path, f"{at} should be a title and a list of sentences")
            title = _text(path, at, document[0])
            sentences = [_text(path, at, sentence, empty=True) for sentence in _list(path, at, document[1])]
            text = f"{title}\n{''.join(sentences)}"
            places.append(number.setdefault(text, len(number)))
        question, answer = (_text(path, f"[{i}].{key}", asked.get(key)) for key in ("question", "answer"))
        found.append(Asked(question, (answer,), tuple(dict.fromkeys(places)), ()))
    return _library(path, number, found)


def _library(path: str, number: dict[str, int], found: list[Asked]) -> Library:
    if not found:
        raise UsageError(f"{path} holds no question.")
    return Library(list(number), found[:MOST])


def _list(path: str, what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise unreadable(path, f"{what} should be a list")
    return value


def _of(path: str, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise unreadable(path, f"{what} should hold JSON objects")
    return value


def _text(path: str, what: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise unreadable(path, f"{what} should be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise unreadable(path, f"{what} holds half a character") from None
    return value


__all__ = ["MOST", "Asked", "Library", "read_library"]
