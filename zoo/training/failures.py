"""The errors that processes of one training tell each other of, and what an error says of a lost process."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import ClassVar

from zoo.core.errors import RunError, UsageError
from zoo.core.files import write_atomic
from zoo.training.callbacks import CallbackError

_KINDS: tuple[type[RunError | UsageError], ...] = (RunError, CallbackError, UsageError)


class LostProcess(RunError):
    """Another process of this training was killed, has ended, or does not answer; a new start may well succeed.

    Attributes:
        named: whether the text says which.
        speaks: whether this is the process that says so to a person.
        happened: the one that this process has met, if any.
    """

    happened: ClassVar[LostProcess | None] = None

    def __init__(self, message: str, *, named: bool, speaks: bool):
        super().__init__(message)
        self.named, self.speaks = named, speaks


def tell_launcher(error: BaseException) -> None:
    """Leave word of why this process ends for torch's launcher, in the file that it names.

    `final` says that a new start would end in the same way.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    words = {"message": str(error), "timestamp": int(time.time()), "final": not isinstance(error, LostProcess)}
    if isinstance(error, LostProcess):
        words["named"] = error.named
    with contextlib.suppress(RunError):
        write_atomic(Path(path), json.dumps(words).encode())


def failure_kind(error: Exception) -> int:
    """The number by which processes tell each other of an error."""
    return max(i for i, kind in enumerate(_KINDS) if isinstance(error, kind))


def failed_as(kind: int, text: str) -> RunError | UsageError:
    """An error of this kind."""
    return _KINDS[kind](text)


def failure(kind: int) -> RunError | UsageError:
    """The error of a process that ends because the leading one has failed with an error of this kind."""
    return failed_as(kind, "The leading process of this training has failed.")


def is_lost(error: RuntimeError) -> bool:
    """Whether an error is about the connection to another process."""
    signs = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "process group", "peer", "the callback")
    ours = type(error).__module__.startswith("torch.distributed")
    return ours or any(sign in str(error).lower() for sign in signs)


__all__ = ["LostProcess", "failed_as", "failure", "failure_kind", "is_lost", "tell_launcher"]
