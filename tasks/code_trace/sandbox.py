"""Runs a person's file of functions where it can do no harm, and reads back its traces as JSON, never as code.

The file is parsed, imported and run by `child.py` only, in a process of its own: no site packages, no environment, an
empty temporary folder, 5 seconds of processor time and 10 of the clock, 512 MiB of memory, 16 MiB of output. The hash
seed is fixed, so that sets come in the same order each time. Around it stand, from the outside in (`barriers` says
which of them this system has):

1. on Linux, namespaces of its own (users, network, processes, mounts), where the system lets it have them,
   `no_new_privs` and Landlock;
2. on Linux (x86_64 and aarch64), a seccomp filter: the kernel refuses every system call but those that compute, write
   to the standard output and end the process;
3. `setrlimit`, an audit hook, and no functions of the modules `os`, `posix` and `signal`.

What is kept out by the kernel, whatever the file does, be it native code: opening, reading or changing any file,
sockets, new processes and threads, signals and other reach to processes. What is not: the file may use up its time,
memory and output, end its own process, and lie about its own trace, which is read as JSON, checked, and never executed.
A fault of the kernel itself is not contained.

Where there is no such filter (macOS, other processors, a kernel without it) only the third holds, which is the
interpreter's own and can be outwitted. A file is refused there, unless `ZOO_TRUST` names it (several, separated by
`:`). Windows has none of the three, and no file is run there.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from zoo.core.errors import UsageError
from zoo.core.readers import at_line, read_text, shown
from zoo.tasks.code_trace.tokens import KINDS
from zoo.tasks.code_trace.tracer import Frame

SECONDS = 10
TRUST = "ZOO_TRUST"
"""The environment variable that names files which may run where the system cannot confine them, separated by
`os.pathsep`."""
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
        UsageError: a file that cannot be read, holds no call or something else, or does what is not allowed; examples
            that are too long; one line that names the file and, where it is known, the line.
    """
    source = _read(path)
    answer = _run(path, {"source": source, "room": most, "trusted": _is_trusted(path)})
    match answer:
        case {"wall": False} if "examples" not in answer and "error" not in answer:
            told = f"this system offers no filter of system calls to confine it; if you trust it, set {TRUST}="
            raise UsageError(f"{shown(path)} is not run: {told}{shown(path)}.")
        case {"error": [int(line), str(why)]}:
            raise at_line(path, line, "".join(c if c.isprintable() else " " for c in why)[:600])
        case {"examples": []}:
            raise UsageError(f"{path!r} holds no example call such as gcd(12, 18).")
        case {"examples": [*found]}:
            return [_example(path, item) for item in found]
    raise _unreadable(path)


def _read(path: str) -> str:
    text = read_text(path, most=_LARGEST_FILE).replace("\r\n", "\n")
    strange = next((i for i, c in enumerate(text) if (c < " " and c not in "\t\n") or c == "\x7f"), None)
    if strange is not None:
        raise at_line(path, text.count("\n", 0, strange) + 1, f"{text[strange]!a} has no place in a program")
    return text


@functools.cache
def barriers() -> tuple[bool, list[str]]:
    """Whether this system can confine a stranger's file, and what stands around one that runs here."""
    if os.name != "posix":
        return False, []
    answer = _run("", {"source": "", "room": 0, "trusted": False})
    match answer:
        case {"wall": bool(wall), "held": [*held]}:
            return wall, [str(step) for step in held]
    return False, []


def _is_trusted(path: str) -> bool:
    named = [name for name in os.environ.get(TRUST, "").split(os.pathsep) if name]
    return any(os.path.realpath(name) == os.path.realpath(path) for name in named)


def _run(path: str, job: dict[str, Any]) -> Any:
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
            child.communicate(json.dumps(job), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise UsageError(f"{path!r} did not end within {SECONDS} seconds.") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        # The second of each pair is told by a process that waited for the one that was ended.
        if child.returncode in (end for s in (signal.SIGXCPU, signal.SIGKILL) for end in (-s, 128 + s)):
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
