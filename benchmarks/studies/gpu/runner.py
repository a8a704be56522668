"""Runs a part in processes of its own: what hangs is killed, what crashes is noted, and the rest is measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.benchmarks.studies.gpu.child import POISONED
from zoo.benchmarks.studies.gpu.part import CRASHED, OVER, Part, Row, Settings

POLL = 0.1
GRACE = 0.1
"""Share of a part's seconds in which no further item begins, so that what has begun can end."""
STARTS = 20
"""Processes of one part at most: a machine on which everything crashes is left alone."""


class Lines:
    """What a process has appended to a file, as it comes."""

    def __init__(self, file: Path):
        self.file, self.read = file, file.stat().st_size if file.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines since the last call."""
        if not self.file.exists():
            return
        with self.file.open("rb") as lines:
            lines.seek(self.read)
            text = lines.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # of a process that was killed while it wrote
                yield json.loads(line)


def run(module: str, part: Part, settings: Settings, done: set[str]) -> Iterator[tuple[str, Any]]:
    """Measure a part.

    Args:
        module: of the part.
        part: itself.
        settings: for the process.
        done: items that are left out.

    Yields:
        ("items", all names), ("row", (name, row)) as they come, and at last ("ended", in words).
    """
    folder, done = settings.folder / part.name, set(done)
    folder.mkdir(parents=True, exist_ok=True)
    lines, end = Lines(folder / "lines.jsonl"), time.monotonic() + settings.seconds
    names: list[str] = []
    for _ in range(STARTS):
        current, began, over, died = None, 0.0, False, False
        child = start(module, part, settings, done, lines.file, end)
        try:
            while True:
                ended = child.poll() is not None
                for line in lines.new():
                    if "items" in line:
                        names = line["items"]
                        yield "items", names
                    elif "begin" in line:
                        current, began = line["begin"], time.monotonic()
                    else:
                        current = None
                        done.add(line["item"])
                        yield "row", (line["item"], line["row"])
                if ended:
                    break
                now = time.monotonic()
                over = now > end
                if over or (current is not None and now - began > part.item_seconds):
                    died = True
                    break
                time.sleep(POLL)
        finally:
            kill(child)
        status = child.returncode
        if current is not None:
            yield "row", (current, _lost(part, settings, time.monotonic() - began, over, died, status, folder))
            done.add(current)
        if over:
            break
        if current is None and status not in (0, POISONED):
            yield "ended", f"its process ended by itself ({_exit(status)}): {last_line(folder)}"
            return
        if current is None and status == 0:
            break
    left = [name for name in names if name not in done]
    yield "ended", f"stopped by its limit of {settings.seconds:.0f} s" if left or over else "complete"


def _lost(part: Part, settings: Settings, took: float, over: bool, died: bool, status: int | None, folder: Path) -> Row:
    """The row of an item that never ended."""
    if over:
        why = f"the part's {settings.seconds:.0f} s were over"
    elif died:
        why = f"it took more than {part.item_seconds:.0f} s"
    else:
        return {"status": CRASHED, "why": f"{_exit(status)}: {last_line(folder)}", "took": round(took, 3)}
    return {"status": OVER, "why": why, "took": round(took, 3)}


def start(
    module: str, part: Part, settings: Settings, done: set[str], file: Path, end: float
) -> subprocess.Popen[bytes]:
    """The process of a part, which writes what it says into a log."""
    caches = settings.folder / part.name / "cache"
    environment = {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "TRITON_CACHE_DIR": str((caches / "triton").resolve()),
        "TRITON_CACHE_AUTOTUNING": "1",
        "TORCHINDUCTOR_CACHE_DIR": str((caches / "inductor").resolve()),
    }
    until = time.time() + end - time.monotonic() - GRACE * settings.seconds
    given = [str(file), json.dumps(settings.data()), json.dumps(sorted(done)), str(until)]
    with (settings.folder / part.name / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "zoo.benchmarks.studies.gpu.child", module, *given],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=hasattr(os, "setsid"),
        )


def kill(child: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, such as compilers."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    if child.poll() is None:
        child.kill()
    child.wait()


def _exit(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def last_line(folder: Path) -> str:
    """The last line of a part's log that says something."""
    log = folder / "log.txt"
    text = log.read_bytes()[-4000:].decode("utf-8", "replace") if log.exists() else ""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in said if line.startswith(("Fatal", "RuntimeError", "torch.", "CUDA"))]
    return (fatal or said or ["it said nothing"])[-1][:300]
