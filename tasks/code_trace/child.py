"""Runs a person's file of functions in a process of its own: a script, started by `sandbox.py`, that trusts nothing.

It reads a job as JSON from its input and writes what it found as JSON to its output. It locks itself in before it looks
at the file: into what the system offers (`confine.py`), limits on processor time, memory, output, open files and
processes, an audit hook that refuses what reaches out of the process, and without the functions that raise no such
event. Where the kernel does not filter system calls it runs no file but one that its user trusts. Standard library
only.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import json
import os
import re
import resource
import sys
import time
import tokenize
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# The package itself is out of reach: an isolated process has no site packages.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from tracer import ENTRY, FILE, MARK, Tracer

if sys.platform == "linux":
    import confine

del sys.path[0]

SECONDS = 5
MEMORY = 512 * 2**20
OUTPUT = 16 * 2**20
MEASURED = 200_000
"""Characters of a trace that is only measured."""
AROUND = 4
"""Separators around a program, three, and behind its trace, one."""
MODULES = (
    "abc", "bisect", "collections", "collections.abc", "copy", "dataclasses", "enum", "functools", "heapq", "itertools",
    "math", "operator", "re", "string", "typing", "weakref", "__future__",
)  # fmt: skip
_EVENTS = {
    "builtins.id", "compile", "exec", "object.__delattr__", "object.__getattr__", "object.__setattr__",
    "sys._getframe", "sys.settrace", "sys.unraisablehook",
}  # fmt: skip
_WALL = "seccomp"
"""The step without which nothing keeps a file's code in that has outwitted the interpreter."""
_REACHING = ("posix", "os", "_signal", "signal", "resource", "_posixsubprocess", "fcntl", "select", "ctypes", "_ctypes")
_HARMLESS = ("_exit", "fspath")
_STATEMENTS = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom)
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


class Refused(Exception):
    """A line of the file that cannot be used, and why."""

    def __init__(self, line: int, why: str):
        super().__init__(why)
        self.line = line


class TooLong(Refused):
    """A call whose program and trace do not fit."""

    def __init__(self, line: int, what: str, room: int):
        super().__init__(line, "")
        self._what, self._room = what, room
        self.needed: int | None = None
        """The room that would do; None where it was not found."""

    def __str__(self) -> str:
        takes = "more" if self.needed is None else f"{self.needed - 1:,}"
        rest = "tokens than" if self.needed is None else "tokens, more than"
        return f"{self._what} take {takes} {rest} seq_len={self._room - 1}; raise it or leave the call out"


class Guard:
    """Refuses what is not allowed, and keeps the first such thing, so that a program cannot hide it by catching it."""

    def __init__(self) -> None:
        self.refused: str | None = None

    def audit(self, event: str, arguments: tuple) -> None:
        """The audit hook: whatever may be imported has been imported before it is set."""
        if event not in _EVENTS:
            self._refuse(f"import {arguments[0]}" if event == "import" else event)

    def load(self, name: str, names: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        """`__import__` for the file's own imports."""
        if name not in MODULES or level:
            self._refuse(f"import {name}")
        return builtins.__import__(name, names, local, wanted, level)

    def refusing(self, what: str) -> Callable[..., NoReturn]:
        """A function that does nothing but refuse."""

        def refuse(*_: Any, **__: Any) -> NoReturn:
            self._refuse(what)

        return refuse

    def builtins(self) -> dict[str, Any]:
        """The builtins that a file has: none that opens a file, asks the user or leads to the modules built in."""
        kept = {name: value for name, value in vars(builtins).items() if name not in ("__loader__", "__spec__")}
        closed = {"open": "open", "input": "builtins.input", "breakpoint": "builtins.breakpoint"}
        return {**kept, **{name: self.refusing(what) for name, what in closed.items()}, "__import__": self.load}

    def strip(self) -> None:
        """Take away what reaches out of the process, as some of it raises no audit event: all functions of the
        system's modules, and those that make modules anew."""
        for name in _REACHING:
            module = sys.modules.get(name)
            for key, value in list(vars(module).items()) if module is not None else ():
                if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and key not in _HARMLESS:
                    area = "os" if name == "posix" else name.lstrip("_")
                    setattr(module, key, self.refusing("open" if key == "open" else f"{area}.{key}"))
        for key in ("create_builtin", "create_dynamic", "get_frozen_object"):
            setattr(sys.modules["_imp"], key, self.refusing("import of another module"))

    def _refuse(self, what: str) -> NoReturn:
        self.refused = self.refused or what
        raise PermissionError(f"{what} is not allowed here")


class _Silence:
    """Where the file's own output goes."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def limit() -> None:
    """Give up processor time, memory, output, files and processes, for good."""
    for kind, most in {
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: OUTPUT,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def in_ascii(source: str) -> str:
    """The same program in ASCII: what is beyond it in strings and comments stands as escapes, such as \\xe9."""
    if source.isascii():
        return source
    lines = source.split("\n")
    kinds: dict[tuple[int, int], str] = {}  # of every place, of those that may hold anything
    formats: list[bool] = []  # whether the f-strings around are raw
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            name = tokenize.tok_name[token.type]
            prefix = token.string[: len(token.string) - len(token.string.lstrip("bBfFrRtTuU"))].lower()
            if name in ("FSTRING_START", "TSTRING_START"):
                formats.append("r" in prefix)
            elif name in ("FSTRING_END", "TSTRING_END"):
                formats.pop()
            elif name in ("STRING", "COMMENT", "FSTRING_MIDDLE", "TSTRING_MIDDLE"):
                raw = name != "COMMENT" and ("r" in prefix if name == "STRING" else formats[-1])
                kind = "a comment" if name == "COMMENT" else "bytes" if "b" in prefix else "a string"
                kind = "a raw string" if raw else kind
                for i in range(token.start[0], token.end[0] + 1):
                    begin = token.start[1] if i == token.start[0] else 0
                    end = token.end[1] if i == token.end[0] else len(lines[i - 1])
                    places = (j for j in range(begin, end + 1) if not lines[i - 1][j : j + 1].isascii())
                    kinds.update(dict.fromkeys(((i, j) for j in places), kind))
    except (tokenize.TokenError, SyntaxError):
        pass  # which the parser tells better
    return "\n".join("".join(_escaped(line, i, j, kinds) for j in range(len(line))) for i, line in enumerate(lines, 1))


def _escaped(line: str, i: int, j: int, kinds: dict[tuple[int, int], str]) -> str:
    """The character at a place, or its escape."""
    character = line[j]
    if character.isascii():
        return character
    before = line[:j]
    where = kinds.get((i, j), "a name, or between names")
    escaped = (len(before) - len(before.rstrip("\\"))) % 2 == 1
    if where == "a comment" or (where == "a string" and not escaped):
        return ascii(character)[1:-1]
    told = "a string, behind a backslash" if where == "a string" else where
    raise Refused(i, f"{character!a} in {told}: only strings and comments may hold what is not ASCII")


def _is_script(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__":`, which is for those who run the file."""
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Compare) or len(node.test.ops) != 1:
        return False
    sides = {ast.unparse(side) for side in (node.test.left, *node.test.comparators)}
    return isinstance(node.test.ops[0], ast.Eq) and sides == {"__name__", "'__main__'"}


def examples(source: str) -> Iterator[tuple[int, str, str] | Refused]:
    """The example calls of a file: line, what they need of the file, and the call; or why one cannot be used."""
    needed: list[tuple[set[str], set[str], str]] = []  # names made, names used, text
    calls: list[ast.Call] = []
    functions: set[str] = set()
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise Refused(error.lineno or 1, f"{error.msg}") from None
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            calls.append(node.value)
        elif isinstance(node, _STATEMENTS):
            made = _made(node)
            if ENTRY in made:
                raise Refused(node.lineno, f"{ENTRY} is the name of the entry; call it otherwise")
            functions |= made if isinstance(node, ast.FunctionDef) else set()
            needed.append((made, _used(node), _text(source, node)))
        elif not _is_script(node) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            told = "allowed are functions, classes, assignments, imports and calls such as f(1, 2)"
            raise Refused(node.lineno, f"a statement that has no place in a file of functions: {told}")
    for call in calls:
        name = call.func.id  # type: ignore[attr-defined]
        if name not in functions:
            yield Refused(call.lineno, f"a call of {name}, which is no function of this file")
            continue
        wanted = _used(call)
        before: set[str] = set()
        while wanted != before:
            before = set(wanted)
            for made, used, _ in needed:
                if made & wanted:
                    wanted |= used
        context = "".join(text + "\n" for made, _, text in needed if made & wanted)
        yield call.lineno, context, in_ascii(ast.unparse(call))


def _made(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def _used(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _text(source: str, node: Any) -> str:
    if getattr(node, "decorator_list", None):
        lines = source.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]
        return "\n".join(lines)
    return ast.get_source_segment(source, node) or ""


def readable(value: Any) -> str:
    """`repr`, without addresses, which change from run to run; the type's name where there is none, as of an object
    that is not finished."""
    try:
        return _ADDRESS.sub("", repr(value))
    except (AttributeError, TypeError, ValueError, LookupError):
        return f"<{type(value).__name__}>"


def trace(line: int, context: str, call: str, room: int, guard: Guard) -> dict[str, Any]:
    """One example call, run and traced; it may take `room` characters with its trace."""
    source = f"{context}def {ENTRY}():{MARK}\n    return {call}\n"
    shown = call if len(call) <= 60 else call[:57] + "..."
    tracer = _traced(line, source, room - len(source) - AROUND, guard)
    if guard.refused is not None:
        raise Refused(line, f"{shown} wants what is not allowed here: {guard.refused}")
    if tracer.stopped:
        long = TooLong(line, f"{shown} and its trace", room)
        if time.process_time() < SECONDS / 2:
            tracer = _traced(line, source, MEASURED, guard)
            if not tracer.stopped:
                long.needed = len(source) + AROUND + MEASURED - tracer.room
        raise long
    if any(frame.value == '"MemoryError"' for frame in tracer.frames):
        raise Refused(line, f"{shown} takes more than {MEMORY // 2**20} MiB of memory")
    return {"line": line, "context": context, "source": source, "frames": tracer.frames}


def _traced(line: int, source: str, room: int, guard: Guard) -> Tracer:
    """The trace of a program, as far as there is room."""
    tracer = Tracer(source, room, readable)
    names: dict[str, Any] = {"__builtins__": guard.builtins(), "__name__": "program"}
    try:
        exec(compile(source, FILE, "exec", dont_inherit=True), names)
        tracer.run(names[ENTRY])
    except BaseException as error:
        if guard.refused is None and not isinstance(error, SystemExit):
            raise Refused(line, f"{type(error).__name__}: {error}") from None
    return tracer


def _all_of(refused: list[Refused]) -> list[Any]:
    """What to say of all calls that cannot be used: the first of them in full."""
    first, *others = refused
    told = str(first)
    if others:
        lines = ", ".join(str(each.line) for each in others[:10]) + (", ..." if others[10:] else "")
        told += f"; {len(others)} more {'calls' if others[1:] else 'call'} cannot be used either, at {lines}"
    needed = [each.needed for each in refused if isinstance(each, TooLong) and each.needed]
    if others and needed:
        told += f"; the longest that was measured takes {max(needed) - 1:,} tokens"
    return [first.line, told]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The file's examples with their traces, or its first error."""
    guard = Guard()
    guard.strip()
    sys.addaudithook(guard.audit)
    try:
        found: list[dict[str, Any]] = []
        refused: list[Refused] = []
        for example in examples(in_ascii(job["source"])):
            guard.refused = None  # of the call before, which has been told of
            try:
                if isinstance(example, Refused):
                    raise example
                found.append(trace(*example, job["room"], guard))
            except Refused as error:
                refused.append(error)
        return {"error": _all_of(refused)} if refused else {"examples": found}
    except Refused as error:
        return {"error": [error.line, str(error)]}
    except (MemoryError, RecursionError) as error:
        return {"error": [1, f"too deep or too large to be read ({type(error).__name__})"]}


def lock_in() -> list[str]:
    """Give up all that the file's code has no need of, for good; names what took hold."""
    for module in MODULES:
        importlib.import_module(module)
    held: list[str] = []
    if sys.platform == "linux":
        held += confine.isolate()
    limit()
    if sys.platform == "linux":
        held += confine.shut()
    return [*held, "limits", "audit hook"]


def main() -> None:
    writing, leave = os.write, os._exit
    job = json.loads(sys.stdin.read())
    held = lock_in()
    sys.stdout = sys.stderr = _Silence()  # type: ignore[assignment]
    said: dict[str, Any] = {"held": held, "wall": _WALL in held}
    if said["wall"] or job["trusted"]:
        said |= answer(job)
    text = json.dumps(said).encode()
    while text:
        text = text[writing(1, text) :]
    leave(0)  # past whatever the file has left behind to be run at the end


if __name__ == "__main__":
    main()
