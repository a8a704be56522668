"""The time a training takes, and how fast it goes when it does nothing but train."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Runs from its making.

    Args:
        seconds: what went before, in earlier parts of the run.
        tokens: trained before.
    """

    def __init__(self, seconds: float, tokens: int):
        self._start = time.perf_counter() - seconds
        self._lap, self._lap_tokens, self._paused = time.perf_counter(), tokens, 0.0

    def seconds(self) -> float:
        """Seconds since the start of the training, over all processes of the run."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not spent on training: evaluating, saving."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    def rate(self, tokens: int) -> float:
        """Tokens per second of training since the last call; `tokens` are all trained so far."""
        now = time.perf_counter()
        rate = (tokens - self._lap_tokens) / max(now - self._lap - self._paused, 1e-9)
        self._lap, self._lap_tokens, self._paused = now, tokens, 0.0
        return rate
