"""A program beside its trace, as text."""

from __future__ import annotations

from zoo.tasks.code_trace import tokens

_MARGIN = 3
_SHOWN = {separator: kind.ljust(10) for kind, separator in tokens.KINDS.items()}
_SHOWN |= {tokens.FRAME: "", tokens.ACTION: " |", tokens.ARG: " -> ", tokens.END: "end", "\n": ""}


def side_by_side(source: str, trace: str, said: str | None) -> str:
    """The program on the left, a line for each frame on the right; under a frame that a model said wrong, what it said
    (`!`), with `^` under each wrong character.

    Args:
        source: the program.
        trace: the trace, or the outcome alone, as text with its separators.
        said: what a model said in place of each character of the trace.
    """
    left = ["program", *source.rstrip("\n").split("\n")]
    right = ["trace" if said is None else "trace (! said instead, ^ wrong)"]
    at = 0
    while at < len(trace):
        end = trace.find(tokens.FRAME, at) + 1 or len(trace)
        right.append(f"  {_words(trace[at:end])}")
        if said is not None and said[at:end] != trace[at:end]:
            right += _difference(trace[at:end], said[at:end])
        at = end
    width = max(map(len, left)) + _MARGIN
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    return "\n".join(f"{a.ljust(width)}{b}".rstrip() for a, b in zip(left, right, strict=True))


def _words(frame: str) -> str:
    return "".join(map(_word, frame))


def _word(character: str) -> str:
    """A character of a frame for a person."""
    return _SHOWN.get(character, character)


def _difference(true: str, said: str) -> list[str]:
    line, marks = "", ""
    for a, b in zip(true, said, strict=True):
        word = _word(b) if a == b else tokens.readable(b)
        line += word
        marks += (" " if a == b else "^") * len(word)
    return [f"! {line}", f"  {marks.rstrip()}"]
