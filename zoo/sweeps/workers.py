"""Where trials are trained: in this process, one after another; or by Ray, see `zoo.sweeps.cluster`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from zoo.sweeps.trial import Job, Outcome, run_trial


class Workers(ABC):
    """Places for trials.

    Attributes:
        count: number of trials at once.
    """

    count: int = 1

    @abstractmethod
    def start(self, job: Job) -> None:
        """Begin a trial; there are never more than `count` that have not come back."""

    @abstractmethod
    def wait(self) -> list[Outcome]:
        """What has come back since, after a moment at most or, where trials are trained here, after one."""

    @abstractmethod
    def records(self) -> dict[int, dict[str, Any]]:
        """The newest validation record of every trial that runs."""

    @abstractmethod
    def stop(self) -> None:
        """Make the trials that run save a checkpoint and come back."""

    @abstractmethod
    def close(self) -> None:
        """Leave no process behind."""


class Here(Workers):
    """This process, in which one trial is trained after another.

    Args:
        judge: see `zoo.sweeps.trial.TrialWatch`.
    """

    def __init__(self, judge: Callable[[int, dict[str, Any]], bool]):
        self._judge = judge
        self._jobs: list[Job] = []

    def start(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> list[Outcome]:
        return [run_trial(self._jobs.pop(0), self._judge)] if self._jobs else []

    def records(self) -> dict[int, dict[str, Any]]:
        return {}

    def stop(self) -> None:
        """Nothing to do: a trial that is trained here sees the signal itself."""

    def close(self) -> None:
        """Nothing to do: there are no other processes."""


__all__ = ["Here", "Workers"]
