"""Run a function under the interpreter's tracer. Needs the standard library only: `child.py` loads it by its path."""

from __future__ import annotations

import json
import opcode
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

FILE = "<program>"
"""The file name under which a program is compiled; frames of any other code are not traced."""
ENTRY = "main"
"""The function where a trace starts."""
_LEAVING = {
    opcode.opmap[name]
    for name in ("RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE", "RETURN_GENERATOR")
    if name in opcode.opmap
}


class Frame(NamedTuple):
    """One step of a trace.

    Attributes:
        kind: "call", "line", "return" or "exception".
        locals: the local variables before the step as JSON, values as strings, `..` where a value is the same as at the
            scope's previous frame; empty for "return" and "exception".
        source: the source line, with its indentation and line end.
        value: what is returned, or the name of the exception's type, as a JSON string; empty for "call" and "line".
    """

    kind: str
    locals: str
    source: str
    value: str


class Stopped(BaseException):
    """The trace outgrew its limits; raised inside the traced program, past any `except Exception`."""


class Tracer:
    """Writes down what a program does.

    Args:
        source: the program.
        room: the most characters that the frames may take, counting 3 separators for each frame and 1 for each value.
        render: a value as text, or None for one that is not allowed.
    """

    def __init__(self, source: str, room: int, render: Callable[[Any], str | None]):
        self._lines = source.splitlines(keepends=True)
        self.room, self._render = room, render
        self._before: dict[FrameType, dict[str, str]] = {}
        self.frames: list[Frame] = []
        self.stopped: str | None = None
        """Why the trace was cut short: "room" or "value"; None where it is whole."""

    def run(self, entry: Callable[[], Any]) -> None:
        """Call `entry`, which takes nothing, and trace it and all that it calls. Its exceptions end here."""
        outer = sys.gettrace()
        sys.settrace(self._enter)
        try:
            entry()
        except (Exception, Stopped):
            pass  # the frames tell
        finally:
            sys.settrace(outer)
            self._before.clear()

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Callable | None:
        code = frame.f_code
        if code.co_filename != FILE or (code.co_name[0] == "<" and code.co_name != "<lambda>"):
            return None
        self._before[frame] = {}
        self._observe(frame, "call")
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Callable:
        if event == "line":
            self._observe(frame, event)
        elif event == "exception":
            self._conclude(frame, event, arg[0].__name__)
        elif event == "return":
            # A scope that an exception leaves "returns" None too, at an instruction that is no return.
            if arg is not None or frame.f_code.co_code[frame.f_lasti] in _LEAVING:
                self._conclude(frame, event, self._text(arg))
            self._before.pop(frame, None)
        return self._step

    def _observe(self, frame: FrameType, kind: str) -> None:
        before = self._before.get(frame, {})
        now = {name: self._text(value) for name, value in frame.f_locals.items()}
        self._before[frame] = now
        shown = {name: ".." if before.get(name) == text else text for name, text in now.items()}
        self._add(Frame(kind, json.dumps(shown), self._line(frame), ""))

    def _conclude(self, frame: FrameType, kind: str, value: str) -> None:
        self._add(Frame(kind, "", self._line(frame), json.dumps(value)))

    def _line(self, frame: FrameType) -> str:
        line = self._lines[frame.f_lineno - 1]
        return line.replace(MARK, "")

    def _text(self, value: Any) -> str:
        text = self._render(value)
        if text is None:
            self._stop("value")
        return text or ""

    def _add(self, frame: Frame) -> None:
        self.room -= len(frame.locals) + len(frame.source) + len(frame.value) + 3 + (not frame.locals)
        if self.room < 0:
            self._stop("room")
        self.frames.append(frame)

    def _stop(self, why: str) -> None:
        self.stopped = why
        raise Stopped


MARK = "  # << START_OF_TRACE"
"""The comment that marks the entry in the source, and is left out of the frames."""
