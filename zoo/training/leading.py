"""What the leading process of a training does for all, and where all processes meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.core.errors import RunError, UsageError
from zoo.training.failures import failure, failure_kind
from zoo.training.group import Group
from zoo.training.stopping import Stop


class Leading:
    """The leading process's work; an error of it is raised in all processes at the same place.

    Attributes:
        failure: of this process, which leads, until all processes meet.
    """

    def __init__(self, group: Group, stop: Stop):
        self.group, self.stop = group, stop
        self.failure: RunError | UsageError | None = None

    def meet(self, *flags: bool) -> list[bool]:
        """Flags that any process has set, in all of them, which end here together if one of them failed."""
        if self.group.size == 1:
            return list(flags)
        failed = 0 if self.failure is None else 1 + failure_kind(self.failure)
        *told, number, failed = self.group.largest(*flags, int(self.stop.number or 0), failed)
        self.stop.number = self.stop.number or number or None
        if failed:
            raise self.failure or failure(failed - 1)
        return [bool(flag) for flag in told]

    def do(self, action: Callable[..., Any], *args: Any) -> bool:
        """Do it in the leading process; if it fails, which is False, all of them end where they meet next."""
        if not self.group.leads:
            return True
        try:
            action(*args)
        except (RunError, UsageError) as error:
            if self.group.size == 1:
                raise
            self.failure = self.failure or error
            return False
        return True


__all__ = ["Leading"]
