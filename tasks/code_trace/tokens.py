"""The vocabulary: ASCII, and the separators of the trace form of CWM (Meta FAIR, 2025, arXiv 2510.02387).

A text is a `str` whose characters below 128 stand for themselves and whose other characters are the separators; a
token is the character's number, and 0 is padding. The separators keep the order that they have in CWM's own vocabulary,
from `frame_sep` (128100 there, 128 here) to `trace_context_start` (128107, 135).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from zoo.tasks.code_trace.tracer import Frame

FRAME, ACTION, RETURN, CALL, LINE, EXCEPTION, ARG, CONTEXT, BEGIN, END = (chr(128 + i) for i in range(10))
VOCAB_SIZE = 138
KINDS = {"call": CALL, "line": LINE, "return": RETURN, "exception": EXCEPTION}

_KIND_OF = {separator: kind for kind, separator in KINDS.items()}
_WORDS = {
    FRAME: "<frame_sep>", ACTION: "<action_sep>", RETURN: "<return_sep>", CALL: "<call_sep>", LINE: "<line_sep>",
    EXCEPTION: "<exception_sep>", ARG: "<arg_sep>", CONTEXT: "<trace_context_start>", BEGIN: "<begin_of_text>",
    END: "<end_of_text>", "\0": "<pad>", "\n": "\\n",
}  # fmt: skip


def prompt(source: str) -> str:
    """What is given: the program, ended by the separator that asks for its trace."""
    return f"{BEGIN}{CONTEXT}{source}{FRAME}"


def trace_text(frames: Iterable[Frame]) -> str:
    """The whole trace."""
    return "".join(map(frame_text, frames)) + END


def frame_text(frame: Frame) -> str:
    """One frame, its ending separator included."""
    text = f"{KINDS[frame.kind]}{frame.locals}{ACTION}{frame.source}"
    return f"{text}{ARG}{frame.value}{FRAME}" if frame.value else text + FRAME


def final_text(frames: list[Frame]) -> str:
    """The outcome alone: how the entry was left, and with what."""
    return f"{KINDS[frames[-1].kind]}{ARG}{frames[-1].value}{FRAME}{END}"


def outcome(text: str) -> tuple[str, str] | None:
    """How a trace, or an outcome alone, says that the program ends: the kind of its last frame that has a value, and
    the value; None where there is none or the text has no end."""
    text, ended, _ = text.partition(END)
    before, found, after = text.rpartition(ARG)
    kinds = [c for c in before if c in _KIND_OF]
    return (_KIND_OF[kinds[-1]], after.partition(FRAME)[0]) if ended and found and kinds else None


def to_tokens(text: str) -> NDArray[np.uint8]:
    """(length,) tokens of a text."""
    return np.frombuffer(text.encode("latin-1"), dtype=np.uint8)


def to_text(tokens: Iterable[int]) -> str:
    """The text of tokens, those outside the vocabulary as `?`."""
    return "".join(chr(t) if 0 <= t < VOCAB_SIZE else "?" for t in tokens)


def readable(text: str) -> str:
    """A text for a person: separators and line ends by name."""
    return "".join(_WORDS.get(c, c) for c in text)
