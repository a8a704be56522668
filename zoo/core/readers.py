"""Readers of files that nobody vouches for: what cannot be read is refused in one line, and nothing waits for ever."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.core.errors import UsageError, quoted

MOST_BYTES = 2**31
"""The most that is read of a file, where a reader names no other limit."""
MOST_BYTES_OF_NAME, MOST_BYTES_OF_PATH = 255, 4000
_FORMS = {  # how files begin that people take for text
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"PK\x03\x04": "a ZIP archive; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PAR1": "a Parquet table; save it as CSV or JSON",
}
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe; write what comes through it to a file first"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: not stat.S_ISREG(mode), "a device"),
)


def shown(text: object) -> str:
    """Text of an untrusted file, or a path, as it may stand in a message: one line, nothing that a terminal obeys."""
    return str(text) if str(text).isprintable() else ascii(str(text))[1:-1]


def unreadable(path: str | Path, reason: object) -> UsageError:
    """The error for a file that cannot be read."""
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    text = " ".join(str(reason).split())  # some libraries' reasons have several lines
    return UsageError(f"{shown(path)} cannot be read: {shown(text)[:300].rstrip('.')}.")


def check_path(path: str | Path, given_as: str = "") -> Path:
    """A path that a file could have, which need not be there.

    Args:
        path: as a person gave it.
        given_as: the option it was given by, for errors.

    Raises:
        UsageError: no file could have it.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{given_as}{'=' if given_as else ''}{quoted(path, 60)} is not allowed: it should be a path.")
    data = os.fsencode(path)
    why = "it holds the character NUL" if b"\0" in data else ""
    if len(data) > MOST_BYTES_OF_PATH or any(len(part) > MOST_BYTES_OF_NAME for part in data.split(b"/")):
        why = f"names may have {MOST_BYTES_OF_NAME} bytes, and paths {MOST_BYTES_OF_PATH:,}"
    if why:
        raise UsageError(f"{given_as}{'=' if given_as else ''}{quoted(str(path), 60)} is not allowed: {why}.")
    return Path(path)


def regular(path: str | Path, *, most: int = MOST_BYTES) -> Path:
    """`path`, once it is known to be a file of at most `most` bytes, or a link to one.

    For libraries that open a file by its name. Reading may never end on a pipe, a socket or a device.

    Raises:
        UsageError: it is none, there is nothing, or it is too large.
    """
    path = Path(path)
    try:
        _check(path, os.stat(path), most)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have, such as one with a NUL
        raise _refused(path, error) from None
    return path


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """All of a file, which has to be one, of at most `most` bytes.

    Raises:
        UsageError: it cannot be read; says why.
    """
    try:
        _check(path, os.stat(path), most)
        waits_never = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(path, os.O_RDONLY | waits_never), "rb") as file:
            _check(path, os.fstat(file.fileno()), most)  # another may have taken its place
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise _refused(path, error) from None
    if data is None or len(data) > most:  # some that call themselves files, as those of /proc, tell no size
        raise unreadable(path, f"it has more than {most:,} bytes")
    return data


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8, with or without the mark (BOM) that some editors put first; line ends as they are.

    Raises:
        UsageError: it cannot be read, or is no such text; says why, and where.
    """
    data = read_bytes(path, most=most)
    if form := form_of(data):
        raise unreadable(path, f"it is {form}")
    try:
        if (at := data.find(b"\0")) >= 0:
            raise UnicodeDecodeError("utf-8", data, at, at + 1, "a NUL byte")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise at_line(path, line, f"this is no UTF-8 text (the byte 0x{data[error.start]:02x})") from None


def form_of(data: bytes) -> str | None:
    """What a file is that begins so, and what to do with it, where it is one that people take for text."""
    return next((form for beginning, form in _FORMS.items() if data.startswith(beginning)), None)


def read_json(path: str | Path, *, most: int = MOST_BYTES, **hooks: Any) -> Any:
    """What a file of JSON holds; `hooks` are those of `json.loads`, and may raise a ValueError.

    Raises:
        UsageError: it cannot be read, or is no JSON; says why, and where.
    """
    return parse_json(path, read_text(path, most=most), **hooks)


def parse_json(path: str | Path, text: str, line: int = 1, **hooks: Any) -> Any:
    """What JSON holds that begins at a line of a file, as `read_json`.

    Raises:
        UsageError: it is none.
    """
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        raise at_line(path, line + error.lineno - 1, f"this is no JSON ({error.msg})") from None
    except RecursionError:
        raise at_line(path, line, "this is no JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:  # of a hook, or a number of too many digits
        reason = "a number has too many digits" if "integer string" in str(error) else str(error)[:200]
        raise at_line(path, line, f"this is no JSON that can be read ({shown(reason)})") from None


def _check(path: str | Path, found: os.stat_result, most: int) -> None:
    kind = next((told for is_kind, told in _KINDS if is_kind(found.st_mode)), None)
    if kind is not None:
        raise unreadable(path, f"it is no file but {kind}")
    if found.st_size > most:
        raise unreadable(path, f"it has more than {most:,} bytes")


def _refused(path: str | Path, error: OSError | ValueError) -> UsageError:
    if isinstance(error, UsageError):
        return error
    if isinstance(error, FileNotFoundError):
        return unreadable(path, "there is no such file")
    return unreadable(path, error if isinstance(error, OSError) else "no file can have such a name")


def at_line(path: str | Path, line: int, message: str) -> UsageError:
    """The error for one line of a file."""
    return UsageError(f"{shown(path)}:{line}: {message}.")
