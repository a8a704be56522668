"""Which of several processes is lost: those that are left report to the store in which they met."""

from __future__ import annotations

import threading
import time
from typing import Any

from zoo.training.failures import LostProcess
from zoo.training.joining import in_agent, launched

SILENT_SECONDS = 5.0  # in which those that are left report: the first to give up closes the others' connections
CLOSED_SECONDS = 2.0  # the same where a connection is closed, for one to report that it has given up
_SILENT, _CLOSED = b"silent", b"closed"


class Roll:
    """The processes of a training, as a list to be called.

    Args:
        store: of torch, in which the processes met; None where it is not known.
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size

    def call(self, timeout: float, *, silent: bool) -> LostProcess:
        """Report that another process is lost, and find out which.

        Args:
            timeout: the seconds for which a process may be silent.
            silent: whether one has not answered for these; else its connection was closed.
        """
        reports: dict[int, bytes] = {}
        seconds = SILENT_SECONDS if silent else 0.0 if launched() else CLOSED_SECONDS
        if self._store is None or not self._gather(reports, _SILENT if silent else _CLOSED, seconds):
            return self._unknown(timeout, silent)
        missing = sorted(set(range(self._size)) - reports.keys())
        silent = _SILENT in reports.values()
        who = "Another process"
        if silent and missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            who = f"Process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}{more} of {self._size}"
        told = _told(who, timeout if silent else None, len(missing))
        return LostProcess(told, named=silent, speaks=self._rank == min(reports))

    def _unknown(self, timeout: float, silent: bool) -> LostProcess:
        """What can be said without the store, which process 0 keeps where no launcher does."""
        kept_by_first = self._store is not None and not in_agent() and self._rank > 0
        who = f"Process 0 of {self._size}" if kept_by_first else "Another process"
        speaks = self._rank == (1 if kept_by_first else 0)
        return LostProcess(_told(who, timeout if silent else None), named=kept_by_first, speaks=speaks)

    def _gather(self, reports: dict[int, bytes], own: bytes, seconds: float) -> bool:
        """Collect the reports of the processes that are left; whether the store could be used."""

        def ask() -> None:
            try:
                self._store.set(f"lost/{self._rank}", own)
                while len(reports) < self._size:
                    for rank in set(range(self._size)) - reports.keys():
                        if self._store.check([f"lost/{rank}"]):
                            reports[rank] = self._store.get(f"lost/{rank}")
                    if time.monotonic() > until:
                        break
                    time.sleep(0.05)
            except RuntimeError:
                reports.clear()  # the process that keeps the store has ended

        until = time.monotonic() + seconds
        thread = threading.Thread(target=ask, daemon=True)  # a store may not answer either
        thread.start()
        thread.join(seconds + 1.0)
        return self._rank in reports


def _told(who: str, silence: float | None, n: int = 1) -> str:
    if silence is None:
        return f"{who} of this training has ended or was killed (its connection is closed)."
    return f"{who} of this training {'have' if n > 1 else 'has'} not answered for {silence:g} s (train.timeout)."


__all__ = ["Roll"]
