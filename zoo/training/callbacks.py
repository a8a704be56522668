"""Callbacks: code of a user's own that is called as a training starts, logs, evaluates, saves and ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from zoo.core.errors import RunError, UsageError, UsageWarning, quoted
from zoo.training.randomness import kept_random_state


class Callback:
    """Base class of callbacks for `zoo.train(..., callbacks=[...])`; every method does nothing until it is overridden.

    Each method receives one mapping of plain values, a copy of its own. Python's, numpy's and torch's random states are
    restored after every call, so a callback changes no weight and no record. Its time counts in `train.time_budget`.
    If a method raises an exception, the run saves a checkpoint, calls `on_end` and ends with a `RunError`.
    Between a checkpoint and the moment at which a process was killed, a resumed run sends its records again: they have
    the same `step`, `split` and figures.
    """

    def on_start(self, run: dict[str, Any]) -> None:
        """The training starts or is resumed.

        Args:
            run: `name`, `folder` (a path as text), `config` (all options), `step` (0, or the step of the checkpoint
                that is resumed) and `resumed`.
        """

    def on_log(self, record: dict[str, Any]) -> None:
        """A training record was written, every `train.log_every` steps: the same fields as in metrics.jsonl."""

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation was made: `split` is "validation", or "test" at the end; fields as in metrics.jsonl."""

    def on_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was saved.

        Args:
            checkpoint: `step`, `path` (as text) and `is_best` (whether validation chose these weights so far).
        """

    def on_end(self, result: dict[str, Any]) -> None:
        """The training ended in this process: the fields of result.json.

        `status` is "finished", "target", "time_budget", "interrupted" or "failed". A run that failed early has few of
        the other fields.
        """


class CallbackError(RunError):
    """An exception of a callback, in one line; the exception itself is its cause."""


class Callbacks:
    """The callbacks of one training.

    Raises:
        UsageError: one of them is no `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback]):
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise UsageError(f"callbacks should be a list, such as [MyCallback()], not {quoted(callbacks, 60)}.")
        self._callbacks = list(callbacks)
        self._started: list[Callback] = []
        for i, callback in enumerate(self._callbacks):
            if not isinstance(callback, Callback):
                given = f"the class {callback.__name__}" if isinstance(callback, type) else quoted(callback, 60)
                told = "it should be an object of a class derived from zoo.Callback"
                raise UsageError(f"callbacks[{i}] is {given}: {told}.")

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def start(self, run: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            self._started.append(callback)
            self._call(callback, "on_start", run)

    def log(self, record: Mapping[str, Any]) -> None:
        self._call_all("on_log", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._call_all("on_evaluation", record)

    def checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._call_all("on_checkpoint", checkpoint)

    def end(self, result: Mapping[str, Any], say: Callable[[str], None] | None = None) -> None:
        """Tell every callback that was started; with `say`, their errors are reported and not raised."""
        failed: CallbackError | None = None
        for callback in self._started:
            try:
                self._call(callback, "on_end", result)
            except CallbackError as error:
                if failed is not None or say is not None:
                    (say or _warn)(str(error))
                failed = failed or error
        self._started = []
        if failed is not None and say is None:
            raise failed

    def _call_all(self, method: str, record: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            self._call(callback, method, record)

    def _call(self, callback: Callback, method: str, record: Mapping[str, Any]) -> None:
        try:
            with kept_random_state():
                getattr(callback, method)(copy.deepcopy(dict(record)))
        except UsageError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            told = f"{type(error).__name__}{': ' if text else ''}{text[:300]}"
            raise CallbackError(f"The callback {type(callback).__name__} failed in {method} ({told}).") from error


def _warn(text: str) -> None:
    import warnings

    warnings.warn(text, UsageWarning, stacklevel=4)


__all__ = ["Callback", "CallbackError", "Callbacks"]
