"""Prompts of a person, as token ids or text, continued by the model of a run or of a published checkpoint."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.core.errors import UsageError
from zoo.core.readers import check_path, read_bytes
from zoo.core.run_files import CONFIG, is_run, no_run
from zoo.interop.hf import CONFIG as PUBLISHED
from zoo.interop.hf import from_hf, read_json
from zoo.models.ends import Ends
from zoo.models.generation import NewTokens
from zoo.training.checkpoint import is_checkpoint
from zoo.training.evaluation import answered, held_out
from zoo.training.loading import load, open_run
from zoo.training.machine import choose_device
from zoo.training.saving import is_saved, load_model

TOKENIZER = "tokenizer.json"
ENDS = ("generation_config.json", PUBLISHED)  # where a checkpoint folder says which token ends a text
BYTE_VOCABULARIES = range(256, 513)  # bytes, and the special tokens after them
CONTEXT = 16  # tokens of the prompt that the text of the first new ones may depend on
PENDING = 16  # tokens that may wait for the rest of a character


class Writing(NamedTuple):
    """How token ids are written and read by a person."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    is_text: bool


class Continuation:
    """A row that grows: its text, piece by piece, no character cut in two."""

    def __init__(self, prompt: list[int], writing: Writing):
        self.prompt, self.tokens, self.text = prompt, list[int](), ""
        self._decode, self._is_text = writing.decode, writing.is_text
        self._ids = prompt[-CONTEXT:] if writing.is_text else []  # ids have no text before them to be spaced from
        self._from, self._said = 0, len(self._ids)

    def add(self, token: int) -> str:
        """What one more token lets be said."""
        self.tokens.append(token)
        self._ids.append(token)
        return self._say(whole=len(self._ids) - self._said < PENDING)

    def end(self) -> str:
        """What is left to say, half a character perhaps."""
        return self._say(whole=False)

    def data(self, stop: Sequence[int]) -> dict[str, Any]:
        """Plain data."""
        ended = bool(self.tokens) and self.tokens[-1] in stop
        text = {"text": self.text} if self._is_text else {}
        return {"prompt": self.prompt, "tokens": self.tokens, **text, "ended": "stop" if ended else "length"}

    def _say(self, whole: bool) -> str:
        before = self._decode(self._ids[self._from : self._said])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (whole and now.endswith("\ufffd")):
            return ""
        self._from, self._said = self._said, len(self._ids)
        self.text += now[len(before) :]
        return now[len(before) :]


def respond(
    source: Path,
    *,
    prompts: Sequence[str] = (),
    tokens: Sequence[str] = (),
    file: str | None = None,
    example: int | None = None,
    split: str = "validation",
    as_bytes: bool = False,
    which: str | None = None,
    device: str = "auto",
    stop: Sequence[str] = (),
    seed: int = 0,
    max_new_tokens: int = 64,
    stream: bool = True,
    as_json: bool = False,
    **options: Any,
) -> Iterator[str]:
    """What a model says, as pieces of what is to be printed, newlines included.

    Nothing in them is a command to a terminal: other control characters of a text are written as in Python's literals.

    Args:
        source: a run folder, one of its checkpoints, a folder of `zoo.save`, or a checkpoint folder as `zoo.from_hf`
            reads it.
        prompts: texts, for a checkpoint folder with a `tokenizer.json` or a model of bytes.
        tokens: prompts as token ids, `"1 2 3"`.
        file: a file that holds one prompt, `-` for standard input: a text where one can be read, otherwise token ids.
        example: which of the examples that `zoo eval` scores to answer instead.
        split: of the example.
        as_bytes: whether token ids are bytes.
        which: "best" or "last" checkpoint of a run, by default the best.
        device: as `train.device`.
        stop: token ids that end a row, or "none"; by default those that a checkpoint folder names.
        seed: of the samples; each prompt has a stream of its own.
        max_new_tokens: the most tokens to add to a prompt.
        stream: give a single prompt's text as it comes.
        as_json: give one line of JSON.
        **options: of `Ends.generate`; None stands for its default.

    Raises:
        UsageError: no such folder, no prompt or prompts of several kinds, a prompt that cannot be read, or what
            `generate` refuses.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if bool(prompts) + bool(tokens) + (file is not None) + (example is not None) != 1:
        raise UsageError("Give a prompt in one way: --prompt, --tokens, --prompt-file or --example.")
    if tokens and as_bytes:
        raise UsageError("--bytes is for text: --tokens cannot go with it.")
    if example is not None:
        unread = [*given, *(["stop"] if stop else []), *(["bytes"] if as_bytes else [])]
        if unread:
            told = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unread))
            raise UsageError(f"--example is answered as zoo eval has it answered: {told} cannot go with it.")
        drawn, data = answer_example(source, example, split=split, which=which or "best", device=device)
        yield f"{json.dumps(data) if as_json else drawn}\n"
        return
    target, published = choose_device(device), is_published(source)
    one = published or is_saved(source)
    if which is not None and (one or is_checkpoint(source)):
        raise UsageError(f"--which={which} chooses from a run: {source} is a checkpoint folder, which holds one model.")
    if is_saved(source):
        model: Ends = load_model(source).to(target)
    else:
        model = from_hf(source, device=target) if published else load(source, which or "best").to(target)
    writing = IDS if tokens else _writing(source, model, as_bytes, text=bool(prompts))
    asked = [writing.encode(text) for text in ([_content(file)] if file is not None else prompts or tokens)]
    rows = [Continuation(prompt, writing) for prompt in asked]
    ends = _stop(source, model, stop, one)
    steps = model.stream(
        asked,
        max_new_tokens,
        stop=ends,
        generator=torch.Generator().manual_seed(seed),
        **given,
    )
    pieces = _pieces(steps, rows)
    if len(rows) == 1 and stream and not as_json:
        yield from map(_printable, pieces)
        yield "\n"
        return
    for _ in pieces:
        pass
    if as_json:
        yield json.dumps({"model": str(source), "rows": [row.data(ends) for row in rows]}) + "\n"
    else:
        texts = [_printable(row.text) for row in rows]
        yield from (f"{i}: {text}\n" if len(rows) > 1 else f"{text}\n" for i, text in enumerate(texts))


def _pieces(steps: Iterator[NewTokens], rows: list[Continuation]) -> Iterator[str]:
    """The rows' text as it comes."""
    for numbers, tokens in steps:
        for row, token in zip(numbers.tolist(), tokens.tolist(), strict=True):
            yield rows[row].add(token)
    for continuation in rows:
        yield continuation.end()


def _printable(text: str) -> str:
    """Text with what a terminal might obey escaped; newlines, tabs and all kinds of spaces stay."""
    kept = (c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if keep else ascii(c)[1:-1] for c, keep in zip(text, kept, strict=True))


def answer_example(
    run: Path, row: int, *, split: str = "validation", which: str = "best", device: str = "auto"
) -> tuple[str, dict[str, Any]]:
    """An example of a run's own task with the model's answer: drawn for a person, and as plain data.

    It is answered as `zoo eval` has it answered: at the run's precision, with its threads.

    Args:
        run: a run folder, or one of its checkpoints.
        row: which of the held-out examples that `zoo eval` scores, from 0.
        split: of the example.
        which: "best" or "last" checkpoint.
        device: as `train.device`; "auto" is the run's own.

    Raises:
        UsageError: no such run or split.
    """
    if is_published(run) or is_saved(run):
        raise UsageError(f"{run} is a checkpoint folder, which has no task: --example needs a run folder.")
    opened = open_run(run, {} if device == "auto" else {"train.device": device}, which)
    task, objective, _ = opened.parts
    batch = held_out(task, split, 1, start=row)
    predictions = answered(opened.model, objective, batch, batch_size=1, precision=opened.precision).predictions
    score = {k: v for k, v in task.score(batch, predictions).items() if k not in ("n", "slices")}
    rows = {"inputs": batch.inputs, "targets": batch.targets, "predictions": predictions}
    named = {"run": str(run), "checkpoint": str(opened.checkpoint), "split": split, "example": row}
    data = {**named, **{k: v[0].tolist() for k, v in rows.items()}, **score}
    return task.render(batch, 0, predictions), data


def is_published(path: Path) -> bool:
    """Whether a folder is a published checkpoint rather than a run.

    Raises:
        UsageError: it is a folder, and neither.
    """
    if not check_path(path).is_dir() or is_run(path) or is_checkpoint(path) or is_saved(path):
        return False
    if not (path / PUBLISHED).exists():
        if any(is_run(p) for p in path.iterdir()):
            raise UsageError(no_run(path))
        raise UsageError(f"{path} is neither a run folder, with a {CONFIG}, nor a checkpoint folder, with {PUBLISHED}.")
    return True


# ---- reading


def _content(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else read_bytes(file)
    except UsageError as error:
        raise UsageError(f"--prompt-file {error}") from None
    return data.decode("utf-8", "surrogateescape").removesuffix("\n")


def _stop(source: Path, model: Ends, given: Sequence[str], one: bool) -> list[int]:
    if list(given) == ["none"]:
        return []
    if given:
        return [token for text in given for token in _ids(text)]
    for file in ENDS if one else ():
        if not (source / file).exists():
            continue
        ends = read_json(source / file, source).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if found := [e for e in ends if isinstance(e, int) and 0 <= e < model.config.vocab_size]:
            return found
    return []


# ---- token ids as text


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        told = text if len(text) <= 60 else text[:60] + "..."
        raise UsageError(f"{told!r} is not a list of token ids: write whole numbers, such as 1 2 3.") from None


IDS = Writing(_ids, lambda ids: " ".join(map(str, ids)), is_text=False)
BYTES = Writing(
    lambda text: list(text.encode("utf-8", "surrogateescape")),
    lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"),
    is_text=True,
)


def _writing(source: Path, model: Ends, as_bytes: bool, *, text: bool) -> Writing:
    """Bytes, the folder's tokenizer, or plain ids where there is none and no text asks for one."""
    if as_bytes:
        if (n := model.config.vocab_size) not in BYTE_VOCABULARIES:
            raise UsageError(f"--bytes is for models of 256 bytes and a few special tokens, not of vocab_size={n}.")
        return BYTES
    path = source / TOKENIZER
    if not path.is_file():
        if text:
            told = 'give token ids with --tokens "1 2 3", or --bytes for a model of bytes'
            raise UsageError(f"{source} holds no {TOKENIZER}: {told}.")
        return IDS
    try:
        from tokenizers import Tokenizer
    except ImportError:
        told = 'pip install "sequence-zoo[text]", or give token ids with --tokens'
        raise UsageError(f"Reading {path} needs the package tokenizers: {told}.") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # whatever a damaged file raises
        raise UsageError(f"{path} cannot be read: {error}.") from None
    return Writing(
        lambda text: tokenizer.encode(text.encode("utf-8", "replace").decode()).ids,
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        is_text=True,
    )


__all__ = ["answer_example", "respond"]
