"""TensorBoard's view of a run: its records as scalars in event files, through torch's `SummaryWriter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.core.files import writing
from zoo.core.run_files import EVENTS

NOT_SCALARS = ("step", "split", "seconds")
MISSING = "TensorBoard events are not written: pip install 'sequence-zoo[tensorboard]' brings the package tensorboard."
_OF_ONE_NAME = EVENTS + "zoo"  # the one file of runs of earlier versions, which every start wrote anew


class Events:
    """The event files of a run: one for each time that it was started.

    A new file hides what earlier files have of steps after the one from which the run continues, so that no step
    appears twice.

    Args:
        folder: of the run.
        kept: the records of metrics.jsonl from which the run continues.
        say: takes a line for a person.
    """

    def __init__(self, folder: Path, kept: Sequence[Mapping[str, Any]], say: Callable[[str], None]):
        self._folder, self._writer = folder, None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not kept:  # once a run
                say(MISSING)
            return
        with writing(folder):
            (folder / _OF_ONE_NAME).unlink(missing_ok=True)
            earlier = any(folder.glob(EVENTS + "*"))
            first = kept[-1]["step"] if kept else 0
            self._writer = SummaryWriter(folder, purge_step=first if earlier else None)
        for line in kept:
            if not earlier or line["step"] >= first:
                self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """The numbers of a record, each under `split/name`, at its step."""
        if self._writer is None:
            return
        with writing(self._folder):
            for key, value in line.items():
                if key not in NOT_SCALARS and isinstance(value, int | float):
                    self._writer.add_scalar(f"{line['split']}/{key}", value, line["step"])

    def flush(self) -> None:
        if self._writer is not None:
            with writing(self._folder):
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


__all__ = ["MISSING", "Events"]
