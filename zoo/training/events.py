"""TensorBoard's view of a run: its event file, written without the package, in the thread of the training.

A file is a row of records: 8 bytes of length, their checksum, a message of the protocol buffer `Event`, its checksum.
`Event` has wall_time = 1 (double), step = 2 (int64), file_version = 3 (string) and summary = 5. That is a message whose
values = 1 are messages of tag = 1 (string) and simple_value = 2 (float).
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.core.files import open_own, writing

NOT_SCALARS = ("step", "split", "seconds")
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # the wire types of protocol buffers


class EventFile:
    """The event file of a run."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._file = open_own(path)
        self._write(_text(3, "brain.Event:2"))

    def add(self, line: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, each under `split/name`, at its step and seconds."""
        values = [
            _field(1, _BYTES, _text(1, f"{line['split']}/{k}") + _float(2, v))
            for k, v in line.items()
            if k not in NOT_SCALARS and isinstance(v, int | float)
        ]
        time = _key(1, _DOUBLE) + struct.pack("<d", line["seconds"]) if line["seconds"] else b""  # zeros are left out
        step = _key(2, _VARINT) + _varint(line["step"]) if line["step"] else b""
        self._write(time + step + _field(5, _BYTES, b"".join(values)))

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        with writing(self._path):
            self._file.write(length + _checksum(length) + event + _checksum(event))

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _varint(n: int) -> bytes:
    """A whole number in groups of 7 bits, the lowest first; a negative one as 64 bits."""
    n &= 2**64 - 1
    groups = []
    while n > 127:
        groups.append(n & 127 | 128)
        n >>= 7
    return bytes([*groups, n])


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _field(number: int, wire_type: int, data: bytes) -> bytes:
    return _key(number, wire_type) + _varint(len(data)) + data


def _text(number: int, text: str) -> bytes:
    return _field(number, _BYTES, text.encode())


def _float(number: int, value: float) -> bytes:
    try:
        return _key(number, _FLOAT) + struct.pack("<f", value)
    except OverflowError:  # beyond float32
        return _key(number, _FLOAT) + struct.pack("<f", math.copysign(math.inf, value))


@functools.cache
def _table() -> list[int]:
    """CRC-32C of every byte: the polynomial 0x1EDC6F41, bits reversed."""
    table = list(range(256))
    for _ in range(8):
        table = [c >> 1 ^ (0x82F63B78 if c & 1 else 0) for c in table]
    return table


def _checksum(data: bytes) -> bytes:
    """CRC-32C, turned by 15 bits and shifted by a constant, as records of TensorFlow have it."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


__all__ = ["EventFile"]
