"""The errors that processes of one training tell each other of, and what an error says of a lost process."""

from __future__ import annotations

from zoo.core.errors import RunError, UsageError
from zoo.training.callbacks import CallbackError

_KINDS: tuple[type[RunError | UsageError], ...] = (RunError, CallbackError, UsageError)


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


__all__ = ["failed_as", "failure", "failure_kind", "is_lost"]
