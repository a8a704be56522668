"""Python processes that start in a tenth of a second, forked from a server that has imported torch, nothing of `zoo`.

`start` and `run` take what those of `subprocess` take, as far as tests need it. A started process has its own folder,
environment, standard files and signals, and ends as every process of Python does. Tests of what a process imports, or
of torchrun, start real ones, as all do on systems that cannot fork. `python forked.py SOCKET` is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "numpy", "scipy.special",
    "pydantic", "yaml", "safetensors.torch", "filelock", "rich.console", "typer",
)  # fmt: skip
seconds = 0.0
"""Processor seconds of the server's start and of its processes that have ended, which are no children of this one."""
_server: list[str] = []


def _socket_of_server() -> str:
    """The path on which the server listens, started at the first call."""
    global seconds
    if not _server:
        folder = tempfile.TemporaryDirectory(prefix="forked")
        path = os.path.join(folder.name, "socket")
        server = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdout is not None
        seconds += float(server.stdout.readline())
        atexit.register(folder.cleanup)
        atexit.register(server.kill)
        _server.append(path)
    return _server[0]


class _Forked:
    """What tests use of a `subprocess.Popen` with pipes, or with files, of text."""

    def __init__(self, command: Sequence[str], cwd: Any, env: Mapping[str, str], files: Sequence[Any]):
        self.args, self.returncode = command, None
        own, theirs = [], []
        for given in files:
            read, write = os.pipe() if given == subprocess.PIPE else (None, os.dup(given.fileno()))
            own.append(None if read is None else os.fdopen(read, encoding="utf-8"))
            theirs.append(write)
        self.stdout, self.stderr = own
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_socket_of_server())
        request = {"command": list(command[1:]), "cwd": os.fspath(cwd or os.getcwd()), "env": dict(env)}
        text = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(text).to_bytes(8, "little")], theirs)
        self._connection.sendall(text)
        for file in theirs:
            os.close(file)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        global seconds
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            status, took = json.loads(self._answers.readline())
            self.returncode, seconds = status, seconds + took
            self._answers.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        until = None if timeout is None else time.monotonic() + timeout
        found: dict[Any, bytes] = {file: b"" for file in (self.stdout, self.stderr) if file and not file.closed}
        with selectors.DefaultSelector() as selector:
            for file in found:
                selector.register(file, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(None if until is None else max(until - time.monotonic(), 0.0))
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 16)
                    found[key.fileobj] += piece
                    if not piece:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
        self.wait(None if until is None else max(until - time.monotonic(), 0.0))
        return found.get(self.stdout, b"").decode(), found.get(self.stderr, b"").decode()


def start(
    command: Sequence[Any],
    *,
    cwd: Any = None,
    env: Mapping[str, str] | None = None,
    stdout: Any = subprocess.PIPE,
    stderr: Any = subprocess.PIPE,
) -> Any:
    """A process of Python, `[sys.executable, ...]`, with its output in pipes of text, or in files."""
    assert command[0] == sys.executable
    command, env = [str(word) for word in command], os.environ if env is None else env
    if hasattr(os, "fork") and sys.platform != "darwin":  # whose own libraries do not survive a fork
        return _Forked(command, cwd, env, (stdout, stderr))
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, text=True)


def run(
    command: Sequence[Any], *, timeout: float = 240.0, check: bool = False, **how: Any
) -> subprocess.CompletedProcess[str]:
    """What comes of a process of Python, which is killed where it has not ended after so many seconds."""
    process = start(command, **how)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


# ---- the server


def serve(path: str) -> Callable[[], object]:
    """Fork a process for every request, until the pipe on standard input closes; in a forked process, what to run."""
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # else a collection of garbage in a forked process copies all pages of it
    assert not any(name.partition(".")[0] == "zoo" for name in sys.modules)
    running: dict[int, socket.socket] = {}
    ended, awake = socket.socketpair()
    for end in (ended, awake):
        end.setblocking(False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT)}
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whom the server works for
    signal.set_wakeup_fd(awake.fileno(), warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as selector:
        listening.bind(path)
        listening.listen()
        for source in (listening, ended, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        print(time.process_time(), flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    sys.exit()
                if key.fileobj is ended:
                    with contextlib.suppress(BlockingIOError):
                        ended.recv(4096)
                    while running:
                        pid, status, used = os.wait4(-1, os.WNOHANG)
                        if not pid:
                            break
                        answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
                        with running.pop(pid) as connection, contextlib.suppress(BrokenPipeError):
                            connection.sendall(json.dumps(answer).encode() + b"\n")
                    continue
                connection, _ = listening.accept()
                size, files, _, _ = socket.recv_fds(connection, 8, 2)
                text = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
                if pid := os.fork():
                    running[pid] = connection
                    connection.sendall(f"{pid}\n".encode())
                    for file in files:
                        os.close(file)
                    continue
                signal.set_wakeup_fd(-1)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                for end in (ended, awake, connection, *running.values()):
                    end.close()
                return _to_run(json.loads(text), files)


def _to_run(request: dict[str, Any], files: Sequence[int]) -> Callable[[], object]:
    """In a forked process: become that which was asked for, as far as to its first line."""
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    what, *words = request["command"]
    folders = [folder for folder in request["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = ["" if what in ("-c", "-m") else os.path.dirname(os.path.abspath(what)), *folders]
    if what == "-m":
        module, *words = words
        sys.argv = ["-m", *words]
        return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)
    if what != "-c":
        sys.argv = [what, *words]
        return lambda: runpy.run_path(what, run_name="__main__")
    code, *words = words
    sys.argv = ["-c", *words]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return lambda: exec(compile(code, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    sys.path = [folder for folder in sys.path if folder not in (os.path.dirname(os.path.abspath(__file__)), "")]
    job = serve(sys.argv[1])
    job()
