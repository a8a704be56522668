"""TensorBoard's view of a run: its event file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.core.files import open_own, writing

NOT_SCALARS = ("step", "split", "seconds")


class EventFile:
    """TensorBoard's event file, written in this thread: torch's SummaryWriter loses errors in a thread of its own."""

    def __init__(self, path: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._path = path
        with writing(path):
            self._file = open_own(path)
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=0.0, file_version="brain.Event:2"))

    def add(self, line: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=f"{line['split']}/{k}", simple_value=v)
            for k, v in line.items()
            if k not in NOT_SCALARS and isinstance(v, int | float)
        ]
        event = self._event(wall_time=line["seconds"], step=line["step"], summary=self._summary(value=values))
        self._write(event)

    def _write(self, event: Any) -> None:
        with writing(self._path):
            self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        self._file.close()
