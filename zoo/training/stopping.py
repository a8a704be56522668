"""Signals such as Ctrl-C: they may arrive at any time, and training stops between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

IMPATIENT_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """A training stopped by a signal, after its checkpoint was written; its text says how to continue."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_status = 128 + number


class Stop:
    """The signal that stops the training, if one has arrived; `also` may ask for an end without one."""

    number: int | None = None

    def __init__(self, also: Callable[[], bool] = lambda: False):
        self._also = also

    def __call__(self) -> bool:
        return self.number is not None or self._also()


@contextlib.contextmanager
def stop_on_signals(also: Callable[[], bool] = lambda: False) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask for an end; a SIGINT a second or more after the first ends the process at once."""
    stop, asked_at = Stop(also), 0.0

    def ask(number: int, frame: Any) -> None:
        nonlocal asked_at
        now = time.perf_counter()
        if stop.number is None:
            stop.number, asked_at = number, now
        elif number == signal.SIGINT and now - asked_at > IMPATIENT_SECONDS:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
