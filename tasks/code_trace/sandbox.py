"""Runs a person's file of functions where it can do no harm, and reads back its traces as JSON, never as code.

The file is parsed, imported and run by `child.py` only, in a process of its own: no site packages, no environment, an
empty temporary folder, 5 seconds of processor time and 10 of the clock, 512 MiB of memory, 16 MiB of output, no new
processes or threads. An audit hook refuses opening and changing files, sockets, signals, processes and every import but
a few harmless modules of the standard library. The hash seed is fixed, so that sets come in the same order each time.

What is promised: the calling process is not blocked for longer than that, not fed more than that, and not made to
execute anything. What is not: this is the interpreter's own audit hook and `setrlimit` (whose limit on processes does
not bind root), not a container, so a file that exploits a fault of the interpreter itself is not held; and a file made
to lie can lie about its own trace.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tasks.code_trace.tokens import KINDS
from tasks.code_trace.tracer import Frame
from tasks.filing import at_line, read_text
from tasks.registry import UsageError

SECONDS = 10
_LARGEST_FILE = 2**20
_CHILD = Path(__file__).with_name("child.py")


class Example(NamedTuple):
    """An example call of a file.

    Attributes:
        line: where it stands.
        context: what of the file it needs.
        source: the whole program.
        frames: its trace.
    """

    line: int
    context: str
    source: str
    frames: list[Frame]


def read_functions(path: str, most: int) -> list[Example]:
    """The example calls of a Python file of functions, each run and traced.

    Args:
        path: a file of functions, and of what they need: classes, assignments, imports. Its calls at the top level,
            such as `gcd(12, 18)`, are the examples.
        most: the most tokens that a program and its trace may take.

    Raises:
        UsageError: a file that cannot be read, is not ASCII, holds no call or something else, or does what is not
            allowed; an example that is too long; one line that names the file and, where it is known, the line.
    """
    source = _read(path)
    answer = _run(path, json.dumps({"source": source, "room": most}))
    match answer:
        case {"error": [int(line), str(why)]}:
            raise at_line(path, line, "".join(c if c.isprintable() else " " for c in why)[:300])
        case {"examples": []}:
            raise UsageError(f"{path!r} holds no example call such as gcd(12, 18).")
        case {"examples": [*found]}:
            return [_example(path, item) for item in found]
    raise _unreadable(path)


def _read(path: str) -> str:
    text = read_text(path, most=_LARGEST_FILE).replace("\r\n", "\n")
    strange = next((i for i, c in enumerate(text) if not (" " <= c <= "~" or c in "\t\n")), None)
    if strange is not None:
        raise at_line(path, text.count("\n", 0, strange) + 1, f"{text[strange]!a}; programs are written in ASCII")
    return text


def _run(path: str, job: str) -> Any:
    """The child's answer to a job."""
    if os.name != "posix":
        raise UsageError(f"code_trace: path={path!r} needs a POSIX system, whose limits keep a strange file in check.")
    command = [sys.executable, "-S", "-s", "-P", "-B", "-W", "ignore", str(_CHILD)]  # -I, but for the hash seed
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=folder,
            env={"PYTHONHASHSEED": "0"}, start_new_session=True, text=True,
        )  # fmt: skip
        try:
            child.communicate(job, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise UsageError(f"{path!r} did not end within {SECONDS} seconds.") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise UsageError(f"{path!r} took too much processor time or memory and was ended.")
        output.seek(0)
        try:
            return json.load(output)
        except (ValueError, RecursionError):
            raise _unreadable(path) from None


def _example(path: str, item: Any) -> Example:
    match item:
        case {"line": int(line), "context": str(context), "source": str(source), "frames": [*frames]}:
            found = [_frame(path, frame) for frame in frames]
            if found and found[-1].value and _sound(context + source):
                return Example(line, context, source, found)
    raise _unreadable(path)


def _frame(path: str, frame: Any) -> Frame:
    match frame:
        case [str(kind), str(local), str(source), str(value)] if kind in KINDS:
            if _sound(local + source + value) and bool(value) == (kind in ("return", "exception")):
                return Frame(kind, local, source, value)
    raise _unreadable(path)


def _sound(text: str) -> bool:
    return text.isascii() and "\0" not in text  # 0 is padding


def _unreadable(path: str) -> UsageError:
    return UsageError(f"{path!r} ended its process before its traces could be read.")
