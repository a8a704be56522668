"""Files that are there whole or not at all, and write errors told in one line."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tasks.registry import UsageError


class RunError(RuntimeError):
    """A run that cannot go on through no wrong input: a full disk, a loss that is not finite. Its text is one line."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system into a `RunError` that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write and flush to the disk; the file may be torn if this is cut short."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder last through a crash."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path`: a reader sees the old content or the new, whatever happens meanwhile.

    Raises:
        RunError: the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            write_bytes(temporary, data)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def open_own(path: Path, *, keep: bool = False) -> Any:
    """Open a file of a run for writing, its content kept or gone; never one that a link leads to.

    Raises:
        OSError: the file system refuses, or there is a link in its place.
    """
    if not keep:
        path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if keep else os.O_EXCL)
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "ab" if keep else "wb")


def set_aside(paths: Iterable[Path], trash: Path) -> None:
    """Move files and folders into a new folder, all of them or none.

    Raises:
        RunError: one cannot be moved; then all are where they were.
    """
    moved: list[tuple[Path, Path]] = []
    at = trash
    try:
        trash.mkdir()
        for at in paths:
            at.rename(trash / at.name)
            moved.append((at, trash / at.name))
    except OSError as error:
        for old, new in reversed(moved):
            new.rename(old)
        with contextlib.suppress(OSError):
            trash.rmdir()
        raise RunError(f"Cannot delete {at}: {error.strerror or error}; nothing was deleted.") from None


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure in the format that the file's name asks for.

    Raises:
        UsageError: a format that matplotlib does not write.
        RunError: the file system refuses.
    """
    formats = figure.canvas.get_supported_filetypes()
    suffix = path.suffix.removeprefix(".")
    if suffix not in formats:
        raise UsageError(f"{str(path)!r} has no ending that names a picture format. Available: {', '.join(formats)}.")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150)
    write_atomic(path, buffer.getvalue())
